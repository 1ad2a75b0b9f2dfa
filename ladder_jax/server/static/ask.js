// The form: sends a prompt to the API and shows the tokens of the answer as they come.
import { duration } from "./numbers.js";
import { events } from "./sse.js";

const find = (id) => document.getElementById(id);
const form = find("form");
const answer = find("answer");
const PATHS = { chat: "v1/chat/completions", completion: "v1/completions" };

/** Makes the form work.
 * @param {() => Record<string, string>} headers of every request
 * @param {() => string} model the name to ask for
 */
export function enable(headers, model) {
  let abort = null;

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (abort) return; // an answer is still coming
    abort = new AbortController();
    setRunning(true);
    try {
      await ask(headers(), model(), abort.signal);
    } catch (error) {
      // A stop by the user is no error; the text that has come stays.
      if (!abort.signal.aborted) find("error").textContent = error.message;
    } finally {
      abort = null;
      setRunning(false);
    }
  });
  find("stop").addEventListener("click", () => {
    if (abort) abort.abort();
    find("measured").textContent = "stopped";
    find("prompt").focus(); // the button that had the focus is disabled now
  });
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
}

function setRunning(running) {
  find("send").disabled = running;
  find("stop").disabled = !running;
  // Screen readers then read the whole answer when it is complete.
  answer.setAttribute("aria-busy", String(running));
}

function body(model) {
  const kind = new FormData(form).get("kind");
  const text = find("prompt").value;
  const input =
    kind === "chat" ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  return {
    path: PATHS[kind],
    fields: {
      model,
      ...input,
      max_tokens: find("max-tokens").valueAsNumber,
      temperature: find("temperature").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    },
  };
}

async function ask(headers, model, signal) {
  find("error").textContent = "";
  find("measured").textContent = "";
  const output = document.createTextNode(""); // text alone: HTML in it stays text
  answer.replaceChildren(output);
  const started = performance.now();
  const { path, fields } = body(model);
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(fields),
    signal,
  });
  if (!response.ok) throw new Error(await reason(response));
  let first = null;
  let last = null;
  let finish = null;
  let usage = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    for (const choice of chunk.choices) {
      const text = choice.text ?? choice.delta?.content ?? "";
      finish = choice.finish_reason ?? finish;
      if (!text) continue;
      last = performance.now();
      first ??= last;
      output.appendData(text);
      answer.scrollTop = answer.scrollHeight;
    }
  }
  if (finish === null) throw new Error("the answer broke off: the connection ended");
  find("measured").textContent = measured(started, first, last, usage, finish);
}

function measured(started, first, last, usage, finish) {
  const parts = [`ended by ${finish}`];
  const tokens = usage?.completion_tokens;
  if (tokens !== undefined) parts.unshift(`${tokens} tokens`);
  if (first !== null)
    parts.unshift(`first text after ${duration((first - started) / 1000)}`);
  if (tokens > 1 && last > first)
    parts.push(`${((1000 * (tokens - 1)) / (last - first)).toFixed(1)} tokens a second`);
  return parts.join(", ");
}

/** The server's own words for an error, if it has any. */
async function reason(response) {
  const status = `${response.status} ${response.statusText}`.trim();
  try {
    const { error, detail } = await response.json();
    return `${status}: ${error?.message ?? JSON.stringify(detail ?? "")}`;
  } catch {
    return status;
  }
}
