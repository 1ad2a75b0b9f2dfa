// The states of the last seconds, and what follows from them.

export const SECONDS = 30;
const RATE_SECONDS = 3; // a rate is the mean over so long

/** Keeps the states of the last `SECONDS`, oldest first. */
export class History {
  constructor() {
    this.states = [];
  }

  /** Adds a state. A server that started again begins a new history. */
  add(state) {
    const last = this.states.at(-1);
    if (last && state.time < last.time) this.states = [];
    this.states.push(state);
    const oldest = state.time - SECONDS;
    while (this.states[0].time < oldest) this.states.shift();
  }

  /** The newest state. */
  get now() {
    return this.states.at(-1);
  }

  /** Tokens of the widest bar: the most that a request of the history may reach. */
  get scale() {
    let most = 1;
    for (const { slots } of this.states)
      for (const slot of slots)
        if (slot) most = Math.max(most, slot.prompt_tokens + slot.max_tokens);
    return most;
  }

  /** How many requests waited: [{time, value}]. */
  get waiting() {
    return this.states.map(({ time, waiting }) => ({ time, value: waiting }));
  }

  /** Output tokens a second, of all slots together: [{time, value}]. */
  get rates() {
    const rates = [];
    let first = 0;
    for (const { time, counters } of this.states) {
      while (this.states[first].time < time - RATE_SECONDS) first++;
      const start = this.states[first];
      const seconds = time - start.time;
      const value = (counters.tokens - start.counters.tokens) / seconds;
      if (seconds >= 0.5) rates.push({ time, value });
    }
    return rates;
  }
}

/** A colour of its own for every request; neighbours in number differ most. */
export function hue(request) {
  return (request * 137.508) % 360;
}
