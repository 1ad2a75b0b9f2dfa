// The page: one feed of states, shown as a picture and as numbers, and the form.
import { enable } from "./ask.js";
import { Feed } from "./feed.js";
import { History } from "./history.js";
import { show } from "./numbers.js";
import { draw } from "./picture.js";

const find = (id) => document.getElementById(id);
const history = new History();
const stillness = matchMedia("(prefers-reduced-motion: reduce)");
let model = "";
let paused = false;
let drawn = 0; // performance.now() of the last picture

/** The key stays in this page's memory: it is not stored. */
function headers() {
  const key = find("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function redraw() {
  if (!history.now) return;
  drawn = performance.now();
  show(history);
  draw(history);
}

function onState(state) {
  model = state.model;
  find("model").textContent = model;
  if (!state.slots) return; // the server is starting
  history.add(state);
  const wait = stillness.matches ? 1000 : 0;
  if (!paused && performance.now() - drawn >= wait) redraw();
}

function onConnection(text) {
  const connection = find("connection");
  if (connection.textContent === text) return; // screen readers read every change
  connection.textContent = text;
  connection.dataset.status = text === "ready" ? "ready" : "other";
}

const feed = new Feed(headers, onState, onConnection);
find("key").addEventListener("change", () => feed.restart());
find("pause").addEventListener("click", ({ currentTarget }) => {
  paused = !paused;
  currentTarget.setAttribute("aria-pressed", String(paused));
  if (!paused) redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
window.addEventListener("resize", redraw);
enable(headers, () => model);
feed.restart();
