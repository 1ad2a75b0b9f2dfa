// Draws the slots: a table of what they hold now, and a picture of the last seconds.
import { place, prepare } from "./canvas.js";
import { hue } from "./history.js";

const LABELLED = 24; // with more slots, the rows are too low for text
const HEIGHT = 600; // pixels of all rows, if there are more
const canvas = document.getElementById("history");
const rows = document.getElementById("rows");
const summary = document.getElementById("summary");

/** @param {import("./history.js").History} history */
export function draw(history) {
  const { slots, waiting, staged } = history.now;
  drawTable(slots, history.scale);
  drawHistory(history);
  const busy = slots.filter(Boolean).length;
  summary.textContent =
    `${busy} of ${slots.length} slots decode a request; ` +
    `${staged} staged on the device, ${waiting} waiting.`;
}

function drawTable(slots, scale) {
  if (rows.children.length !== slots.length) {
    rows.replaceChildren(...slots.map((_, i) => newRow(i)));
    const area = document.getElementById("slots");
    const dense = slots.length > LABELLED;
    area.classList.toggle("dense", dense);
    const row = Math.max(Math.floor(HEIGHT / slots.length), 3);
    if (dense) area.style.setProperty("--row", `${row}px`);
    else area.style.removeProperty("--row");
  }
  slots.forEach((slot, i) => {
    const [, progress, request, tokens] = rows.children[i].children;
    const [prompt, output, room] = progress.firstChild.children;
    const share = (count) => `${(100 * count) / scale}%`;
    progress.firstChild.style.setProperty("--hue", slot ? hue(slot.request) : 0);
    prompt.style.width = share(slot ? slot.prompt_tokens : 0);
    output.style.width = share(slot ? slot.tokens : 0);
    const left = slot ? Math.max(slot.max_tokens - slot.tokens, 0) : 0;
    room.style.width = share(left);
    room.hidden = !left; // it has a border
    setText(request, slot ? String(slot.request) : "free");
    setText(
      tokens,
      slot ? `${slot.prompt_tokens} + ${slot.tokens} of ${slot.max_tokens}` : "",
    );
  });
}

function newRow(i) {
  const row = document.createElement("tr");
  const number = document.createElement("th");
  number.scope = "row";
  number.textContent = i;
  const cells = [1, 2, 3].map(() => document.createElement("td"));
  const bar = document.createElement("div");
  bar.className = "bar";
  for (const part of ["prompt", "output", "room"]) {
    const span = document.createElement("span");
    span.className = part;
    bar.append(span);
  }
  cells[0].append(bar);
  row.append(number, ...cells);
  return row;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Draws time to the right, a row for every slot, a column for every state. */
function drawHistory({ states, now, scale }) {
  const { brush, width, height, ratio } = prepare(canvas, rows.clientHeight);
  const style = getComputedStyle(canvas);
  const value = (name) => style.getPropertyValue(name);
  const [lightness, chroma] = [value("--slot-lightness"), value("--slot-chroma")];
  const [track, shade] = [value("--track"), value("--prompt-shade")];
  const row = height / now.slots.length;
  const gap = Math.min(2 * ratio, row / 4);
  const high = (tokens) => (row - gap) * Math.min(tokens / scale, 1);
  brush.fillStyle = track;
  for (let j = 0; j < now.slots.length; j++)
    brush.fillRect(0, Math.round(j * row), width, row - gap);
  states.forEach((state, i) => {
    const right = place(state.time, now.time, width);
    // A state holds from the one before it, unless the page missed some in between.
    const before = i ? states[i - 1].time : state.time;
    const left = place(Math.max(before, state.time - 1), now.time, width);
    state.slots.forEach((slot, j) => {
      if (!slot) return;
      const bottom = Math.round(j * row) + row - gap;
      const bar = (colour, height) => {
        brush.fillStyle = colour;
        brush.fillRect(left, bottom - height, right - left, height);
      };
      const colour = `oklch(${lightness} ${chroma} ${hue(slot.request)}`;
      bar(`${colour} / 0.22)`, row - gap); // the slot is taken
      bar(`${colour})`, high(slot.prompt_tokens + slot.tokens));
      bar(shade, high(slot.prompt_tokens));
    });
  });
}
