// Server-sent events of a response body, as the HTML standard defines them: the data of each.

export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let line = "";
  let data = [];
  let afterReturn = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event that the end cuts off is dropped
      let text = decoder.decode(value, { stream: true });
      if (afterReturn && text) {
        if (text[0] === "\n") text = text.slice(1);
        afterReturn = false;
      }
      if (text.endsWith("\r")) afterReturn = true;
      const lines = (line + text).split(/\r\n|\r|\n/);
      line = lines.pop();
      for (const each of lines) {
        if (each.startsWith("data:")) data.push(each[5] === " " ? each.slice(6) : each.slice(5));
        else if (each === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
