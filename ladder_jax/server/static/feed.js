// Follows the server's state: connects, and connects again when the stream ends.
import { events } from "./sse.js";

const SILENCE = 5000; // ms without an event after which the connection counts as lost
const SHORTEST_WAIT = 1000; // ms between two attempts to connect
const LONGEST_WAIT = 10000;

/** Calls back with every state of the server while the page is visible. */
export class Feed {
  /**
   * @param {() => Record<string, string>} headers of every request
   * @param {(state: object) => void} onState
   * @param {(text: string) => void} onConnection with what the user should know
   */
  constructor(headers, onState, onConnection) {
    this.headers = headers;
    this.onState = onState;
    this.onConnection = onConnection;
    this.abort = new AbortController();
    this.wait = SHORTEST_WAIT;
    this.timer = 0;
    document.addEventListener("visibilitychange", () => this.restart());
  }

  /** Connects now, and forgets the connection that there was. */
  restart() {
    this.abort.abort();
    clearTimeout(this.timer);
    this.wait = SHORTEST_WAIT;
    if (!document.hidden) this.run();
  }

  async run() {
    const abort = (this.abort = new AbortController());
    let text;
    try {
      text = await this.read(abort);
    } catch (error) {
      if (abort !== this.abort) return; // restart() ended it, and runs another
      text = "the server does not answer";
    }
    if (abort !== this.abort || document.hidden) return;
    if (text) this.onConnection(`${text}; connecting again`);
    this.timer = setTimeout(() => this.run(), this.wait);
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
  }

  /** Reads states until the stream ends; returns why it did, "" if the user knows. */
  async read(abort) {
    let silence = setTimeout(() => abort.abort(), SILENCE);
    try {
      const response = await fetch("state", {
        headers: { Accept: "text/event-stream", ...this.headers() },
        cache: "no-store",
        signal: abort.signal,
      });
      if (response.status === 401) return "the server asks for an API key";
      if (!response.ok) return `the server answers with ${response.status}`;
      let status = "ready";
      for await (const data of events(response)) {
        clearTimeout(silence);
        silence = setTimeout(() => abort.abort(), SILENCE);
        const state = JSON.parse(data);
        this.wait = SHORTEST_WAIT;
        if (abort !== this.abort) return "";
        status = state.status;
        this.onConnection(state.detail ? `${status}: ${state.detail}` : status);
        this.onState(state);
      }
      return status === "ready" ? "the server ended the connection" : "";
    } finally {
      clearTimeout(silence);
    }
  }
}
