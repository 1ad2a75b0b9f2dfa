// Shows the queue, the rates and the latencies: two lines, and names with values.
import { drawLine } from "./canvas.js";

const find = (id) => document.getElementById(id);

const count = (value) => value.toLocaleString("en");
const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)}%` : "–");

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 0.01) return `${(1000 * seconds).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

function memory(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const i = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), 4);
  return `${(bytes / 1024 ** i).toFixed(i ? 1 : 0)} ${units[i]}`;
}

function percentiles(values) {
  if (!values) return "–"; // no request has ended in the last minute
  return `${duration(values.p50)} · ${duration(values.p99)}`;
}

/** @param {import("./history.js").History} history */
export function show(history) {
  const { now } = history;
  const { slots, latencies, kv_used_bytes: used, kv_total_bytes: total } = now;
  drawLine(find("waiting"), history.waiting, "Requests waiting");
  drawLine(find("rate"), history.rates, "Output tokens a second");
  fill(find("numbers"), {
    "Room in the queue": count(now.queue_size - now.waiting),
    "Staged on the device": count(now.staged),
    "Slots in use": `${slots.filter(Boolean).length} of ${slots.length}`,
    "KV cache in use": `${share(used, total)} of ${memory(total)}`,
    "Requests finished": count(now.counters.finished),
  });
  fill(find("latencies"), {
    "In the queue": percentiles(latencies.queue),
    "To the first token": percentiles(latencies.first_token),
    "Per output token": percentiles(latencies.per_token),
    "Whole request": percentiles(latencies.end_to_end),
  });
}

/** Shows {name: value} in a description list, which always has the same names. */
function fill(list, values) {
  Object.entries(values).forEach(([name, value], i) => {
    if (!list.children[i]) {
      const pair = document.createElement("div");
      pair.append(document.createElement("dt"), document.createElement("dd"));
      pair.firstChild.textContent = name;
      list.append(pair);
    }
    const shown = list.children[i].lastChild;
    if (shown.textContent !== value) shown.textContent = value;
  });
}
