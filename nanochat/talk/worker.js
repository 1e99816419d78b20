"use strict";
// Runs the engine beside the page, so that the page stays alive. It gets one message with the
// model, then {ask}, {look} and {stop}; it answers with messages that name their `type`.

let engine, current = 0; // the number of the request that is being answered

// Let messages in. A timer would wait for 4 ms.
const channel = new MessageChannel();
function breathe() {
  return new Promise(resolve => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

function fromBase64(text) {
  const padding = (text.match(/=*$/)[0]).length, step = 1 << 16; // a multiple of 4
  const bytes = new Uint8Array(text.length / 4 * 3 - padding);
  for (let i = 0, at = 0; i < text.length; i += step) {
    const part = atob(text.slice(i, i + step));
    for (let j = 0; j < part.length; j++) bytes[at++] = part.charCodeAt(j);
  }
  return bytes.buffer;
}

// Which special token begins which kind of text.
const KINDS = { "<|python_start|>": "python", "<|output_start|>": "python_output",
  "<|python_end|>": "text", "<|output_end|>": "text" };

async function answer(request) {
  const mine = ++current, { tokenizer } = engine;
  const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
  const { ids, leftOut } = engine.prompt(request);
  const question = request.messages ? request.messages.at(-1).content : request.text;
  postMessage({ type: "began", leftOut, question: tokenizer.texts(tokenizer.encode(question)) });
  const names = Object.entries(tokenizer.special).map(([name, id]) => [id, KINDS[name]]);
  const kinds = new Map(names.filter(([, kind]) => kind)), started = performance.now();
  let kind = "text", n = 0;
  for (const event of engine.generate(ids, { ...request, tools: Boolean(request.messages) })) {
    await breathe();
    if (mine !== current) return;
    if (!event) continue;
    const { id, forced, logprob, top, finish } = event;
    n++;
    kind = kinds.get(id) ?? kind;
    const hidden = kinds.has(id) || finish === "stop";
    let text = hidden ? "" : utf8.decode(tokenizer.bytes[id], { stream: true });
    if (finish) text += utf8.decode();
    const part = { type: kind, text };
    if (!forced) part.logprob = logprob;
    if (!forced) part.top = top.map(([other, p]) => [tokenizer.decode([other]), p]);
    const seconds = (performance.now() - started) / 1000;
    postMessage({ type: "token", part, finish, place: ids.length + n - 1, n, seconds });
  }
}

onmessage = async ({ data }) => {
  try {
    if (data.header) {
      engine = new Engine(data.header, fromBase64(data.weights));
      postMessage({ type: "ready" });
    }
    if (data.stop) current++;
    if (data.look) postMessage({ type: "looked", ...engine.look(data.look) });
    if (data.ask) await answer(data.ask);
  } catch (error) { postMessage({ type: "error", message: error.message }); }
};
