// Reads server-sent events. EventSource cannot send an API key or a POST, fetch can.

/**
 * Yields the data of every event of a response, as text.
 * @param {Response} response
 * @returns {AsyncGenerator<string>}
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop(); // the last line has not ended yet
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } // a comment or another field: no data
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}
