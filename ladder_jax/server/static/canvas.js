// What every drawing over time needs.
import { SECONDS } from "./history.js";

/** Empties a canvas and fits it to the screen: `height` is in CSS pixels. */
export function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const size = { width: canvas.clientWidth * ratio, height: height * ratio };
  if (canvas.clientHeight !== height) canvas.style.height = `${height}px`;
  for (const side of ["width", "height"]) {
    const pixels = Math.round(size[side]);
    if (canvas[side] !== pixels) canvas[side] = pixels;
  }
  const brush = canvas.getContext("2d");
  brush.clearRect(0, 0, canvas.width, canvas.height);
  return { brush, width: canvas.width, height: canvas.height, ratio };
}

/** Where a moment is in a drawing of the last seconds. */
export function place(time, now, width) {
  return Math.round(width * (1 - (now - time) / SECONDS));
}

/**
 * Draws values over time as a line. The label, a caption, tells the value now and the
 * highest.
 * @param {HTMLCanvasElement} canvas
 * @param {{time: number, value: number}[]} points
 * @param {string} name of the values
 */
export function drawLine(canvas, points, name) {
  const { brush, width, height, ratio } = prepare(canvas, 40);
  const most = Math.max(1, ...points.map(({ value }) => value));
  const now = points.at(-1);
  const text = (value) => value.toFixed(value < 10 && value % 1 ? 1 : 0);
  const label = now ? `${name}: ${text(now.value)} now, at most ${text(most)}` : name;
  const caption = canvas.parentElement.querySelector("figcaption");
  if (caption.textContent !== label) caption.textContent = label;
  brush.strokeStyle = getComputedStyle(canvas).getPropertyValue("--accent");
  brush.lineWidth = 2 * ratio;
  brush.lineJoin = "round";
  brush.beginPath();
  for (const { time, value } of points) {
    const y = height - ratio - (height - 2 * ratio) * (value / most);
    brush.lineTo(place(time, now.time, width), y);
  }
  brush.stroke();
}
