"use strict";
// Lets page.js chat without a server. Its requests go to `fetch`; here they are answered, as the
// server's API does, by a worker that holds the model. Nothing leaves the page.

// The text of a block of data; the block is removed to free its memory.
function block(id) {
  const element = document.getElementById(id);
  element.remove();
  return element.textContent;
}

const header = JSON.parse(block("header"));
const program = URL.createObjectURL(new Blob([block("engine")], { type: "text/javascript" }));
const worker = new Worker(program);
let listener = null; // gets the worker's messages about the answer or the look that was asked for
let places = []; // of the tokens that the last answer shows, in the model's sequence
const ready = new Promise(resolve => { listener = resolve; });
worker.onmessage = ({ data }) => listener?.(data);
worker.postMessage({ header, weights: block("weights") });

function respond(body, status = 200) { return new Response(JSON.stringify(body), { status }); }

// The worker's request for what page.js asks of the API.
function wanted({ messages, prompt, temperature, top_k, top_logprobs, logprobs, max_tokens }) {
  return { messages, text: prompt, temperature, topK: top_k,
    nTop: top_logprobs ?? logprobs, maxTokens: max_tokens ?? header.max_tokens };
}

// Show the pieces of the question as tokens, too.
function cutQuestion(pieces) {
  const turns = document.querySelectorAll(".user"), text = turns[turns.length - 1].lastElementChild;
  text.replaceChildren(...pieces.filter(Boolean).map(piece => {
    const token = document.createElement("span");
    token.className = "token";
    token.textContent = piece;
    return token;
  }));
}

function event(data) { return new TextEncoder().encode(`data: ${JSON.stringify(data)}\n\n`); }

function showSpeed({ n, seconds }) {
  const speed = document.getElementById("model");
  speed.textContent = `${header.name}, ${Math.round(n / seconds)} tokens a second`;
}

// Pass the worker's tokens on as server-sent events, until the answer ends or is stopped.
function stream(controller, signal) {
  const stop = () => {
    listener = null;
    worker.postMessage({ stop: true });
    controller.error(new DOMException("stopped", "AbortError"));
  };
  if (signal.aborted) return stop();
  signal.addEventListener("abort", stop);
  listener = data => {
    if (data.type === "error") controller.enqueue(event({ error: data, choices: [] }));
    else {
      const choice = { parts: [data.part], finish_reason: data.finish ?? null };
      controller.enqueue(event({ choices: [choice] }));
      if (data.part.text) places.push(data.place);
    }
    if (data.type !== "error" && !data.finish) return;
    if (data.finish) showSpeed(data);
    signal.removeEventListener("abort", stop);
    listener = null;
    controller.close();
  };
}

globalThis.fetch = async (path, { body, signal } = {}) => {
  const loaded = await ready, { name: model, stage } = header;
  if (path.endsWith("/health")) {
    return respond({ status: loaded.message ?? "ready", model, stage });
  }
  places = [];
  hideLook();
  const began = new Promise(resolve => { listener = resolve; });
  worker.postMessage({ ask: wanted(JSON.parse(body)) });
  const first = await began;
  if (first.type === "error") return respond({ error: first }, 400);
  cutQuestion(first.question);
  const note = first.leftOut && "The conversation is longer than the model's context: " +
    `${first.leftOut} older messages were left out.`;
  return new Response(new ReadableStream({ start(controller) {
    if (note) controller.enqueue(event({ choices: [], nanochat: { note } }));
    stream(controller, signal);
  } }));
};

// ---- tokens in colour, and what the model looked at -------------------------------------------

const part = id => document.getElementById(id);
let looked = null; // {texts, weights} of the token that was chosen last

function hideLook() { part("look").hidden = true; }

// The place of a token of the last answer in the model's sequence, if the page still shows it.
function placeOf(token) {
  const answers = document.querySelectorAll(".assistant");
  const tokens = [...answers[answers.length - 1].querySelectorAll(".token")];
  return tokens.length === places.length ? places[tokens.indexOf(token)] : undefined;
}

// The weights of the chosen head, or the mean over all.
function chosenWeights() {
  const heads = looked.weights.flat(), chosen = part("head").value;
  if (chosen !== "all") return heads[Number(chosen)];
  return heads[0].map((_, t) => heads.reduce((sum, head) => sum + head[t], 0) / heads.length);
}

function drawLook() {
  const weights = chosenWeights();
  part("tokens").replaceChildren(...looked.texts.map((text, t) => {
    const token = document.createElement("span");
    token.textContent = text;
    token.title = `${(100 * weights[t]).toFixed(1)}%`;
    // the root makes small weights visible
    const shade = Math.round(100 * Math.sqrt(weights[t]));
    token.style.background = `color-mix(in srgb, var(--accent) ${shade}%, transparent)`;
    return token;
  }));
  part("tokens").scrollTop = part("tokens").scrollHeight; // the nearest tokens, which matter most
}

function fillHeads({ weights }) {
  if (part("head").length > 1) return;
  weights.forEach((heads, layer) => heads.forEach((_, head) => {
    const option = document.createElement("option");
    option.value = layer * heads.length + head;
    option.textContent = `layer ${layer + 1}, head ${head + 1}`;
    part("head").append(option);
  }));
}

function lookAt(token) {
  const place = placeOf(token);
  part("why").textContent = `\u201c${token.textContent}\u201d ${token.title}`;
  part("look").hidden = false;
  part("attention").hidden = place === undefined || listener !== null;
  if (part("attention").hidden) return;
  listener = data => {
    listener = null;
    looked = data;
    fillHeads(data);
    drawLook();
  };
  worker.postMessage({ look: place });
}

document.addEventListener("click", ({ target }) => {
  if (target.matches(".assistant .token") && target.title) lookAt(target);
});
part("head").addEventListener("change", drawLook);
part("close").addEventListener("click", hideLook);
part("colours").addEventListener("change", ({ target }) => {
  part("log").classList.toggle("coloured", target.checked);
});
if (location.hash === "#colours") part("colours").click(); // lesson 1 opens the page so
