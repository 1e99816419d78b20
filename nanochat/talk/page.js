
"use strict";
const $ = id => document.getElementById(id);
const log = $("log"), box = $("text");
const here = location.pathname.replace(/\/*$/, "/"); // the server may be below a path of a proxy
let messages = [], running = null, base = false, limits = {};

const plain = content => typeof content === "string" ? content : content.map(part => ({ text: "", python: "[", python_output: " = " }[part.type] + part.text + (part.type === "python_output" ? "] " : ""))).join("");
const percent = logprob => { const p = 100 * Math.exp(logprob); return (p < 0.1 ? "below 0.1" : p.toFixed(1)) + "%"; };
const last = () => messages[messages.length - 1];
const headers = () => ({ "Content-Type": "application/json", ...(sessionStorage.apiKey ? { Authorization: "Bearer " + sessionStorage.apiKey } : {}) });

function make(kind, text, tag = "div") {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  return element;
}

function addPart(element, part) {
  if (part.type === "mark" || !part.text) return;
  let place = element, run = element.lastElementChild;
  if (part.type !== "text") {
    if (run && run.className === "call" && !(part.type === "python" && run.querySelector(".python_output"))) place = run;
    else element.append(place = make("call", "", "span"));
    run = place.lastElementChild;
  }
  if (!run || run.className !== part.type) place.append(run = make(part.type, "", "span"));
  const token = make("token", part.text, "span");
  if (part.type === "python_output") token.title = "written by the calculator, not by the model";
  else if (part.logprob !== undefined) {
    const others = (part.top || []).filter(other => other[0] !== part.text).map(other => "\u201c" + other[0] + "\u201d " + percent(other[1]));
    token.title = percent(part.logprob) + (others.length ? "; instead: " + others.join(", ") : "");
  }
  run.append(token);
}

let following = true;
log.addEventListener("scroll", () => { following = log.scrollHeight - log.scrollTop - log.clientHeight < 60; });
new ResizeObserver(() => follow(() => {})).observe(log);

function follow(action) {
  action();
  if (following) log.scrollTop = log.scrollHeight;
}

function addTurn(message) {
  const element = make("turn " + message.role, "");
  for (const part of typeof message.content === "string" ? [{ type: "text", text: message.content }] : message.content) addPart(element, part);
  log.append(element);
  return element;
}

function draw() {
  for (const element of [...log.children]) if (element.id !== "empty") element.remove();
  following = true;
  follow(() => messages.forEach(addTurn));
  update();
}

function tell(kind, text) { follow(() => log.append(make(kind, text))); }

function update() {
  $("empty").hidden = log.children.length > 1;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  log.setAttribute("aria-busy", running !== null);
  for (const id of ["again", "edit", "save"]) $(id).disabled = running !== null || messages.length === 0;
  for (const id of ["clear", "load"]) $(id).disabled = running !== null;
}

async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield parsed(line.slice(6));
  }
}

const elsewhere = what => new Error("what came is not from this server, but perhaps from a proxy before it (" + what + "): see whether the server still runs, then regenerate.");

function parsed(text) {
  try { return JSON.parse(text); } catch { throw elsewhere("no JSON"); }
}

async function checked(response) { // an error's sentence is the server's, if it has one
  if (response.ok && !/html/.test(response.headers.get("content-type"))) return response;
  const { error } = response.ok ? {} : await response.json().catch(() => ({}));
  throw error && error.message ? new Error(error.message) : elsewhere(`status ${response.status}`);
}

// The newest messages that the server takes: the older ones would not be read by the model anyway.
function newest() {
  const most = limits.messages || Infinity, system = messages[0].role === "system" ? 1 : 0;
  let start = messages.length, room = limits.characters || Infinity;
  if (system) room -= plain(messages[0].content).length;
  while (start > system && messages.length - start + system < most && (room -= plain(messages[start - 1].content).length) >= 0) start--;
  while (start < messages.length && messages[start].role !== "user") start++;
  if (start === system || start === messages.length) return messages; // all fit, or not even the last
  return [...messages.slice(0, system), ...messages.slice(start)];
}

function request() {
  const settings = { stream: true, parts: true, temperature: Number($("temperature").value), top_k: Math.max(0, Math.round(Number($("top_k").value) || 0)) };
  if (base) return ["v1/completions", { ...settings, prompt: last().content, logprobs: 4, max_tokens: 128 }];
  return ["v1/chat/completions", { ...settings, messages: newest(), logprobs: true, top_logprobs: 4 }];
}

async function answer() {
  for (const old of log.querySelectorAll(".error, .note")) old.remove();
  const mine = running = new AbortController(), parts = [], element = make("turn assistant waiting", "");
  let finish = null, failed = "", refused = false;
  following = true;
  follow(() => log.append(element));
  update();
  try {
    const [path, body] = request();
    const unsent = body.messages ? messages.length - body.messages.length : 0;
    if (unsent) follow(() => element.before(make("note", `The conversation is long: its ${unsent} oldest messages are no longer sent.`)));
    const response = await fetch(here + path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: mine.signal });
    refused = response.status === 401;
    for await (const event of events(await checked(response))) {
      if (event.error) throw new Error(event.error.message);
      if (event.nanochat && event.nanochat.note && !unsent) follow(() => element.before(make("note", event.nanochat.note)));
      const choice = (event.choices || [])[0] || {};
      finish = choice.finish_reason || finish;
      follow(() => (choice.parts || []).forEach(part => {
        element.classList.remove("waiting");
        addPart(element, part);
        if (part.type === "mark") return;
        const before = parts[parts.length - 1];
        if (before && before.type === part.type) before.text += part.text;
        else parts.push({ type: part.type, text: part.text });
      }));
    }
    if (!finish) failed = "The connection ended before the answer did: regenerate.";
  } catch (error) {
    if (error.name !== "AbortError") failed = error instanceof TypeError ? "The server cannot be reached: see whether it still runs, then regenerate." : error.message[0].toUpperCase() + error.message.slice(1);
  }
  element.classList.remove("waiting");
  if (parts.length) messages.push({ role: "assistant", content: parts.some(part => part.type !== "text") ? parts : parts[0].text });
  else element.remove();
  if (mine.signal.aborted) tell("note", "Stopped.");
  else if (failed) tell("error", failed);
  else if (!parts.length) tell("note", "The model had nothing to say: regenerate, or ask differently.");
  else if (finish === "length") tell("note", "The answer ends here because it reached its greatest length.");
  running = null;
  update();
  if (refused) askForKey(); // only now: a key that is entered sends the question again at once
}

function fit() {
  box.style.height = "auto";
  box.style.height = Math.min(box.scrollHeight, 192) + "px";
}

function send() {
  const text = box.value.trim();
  if (!text || running) return;
  if (messages.length && last().role === "user") { messages.pop(); draw(); }
  messages.push({ role: "user", content: text });
  box.value = "";
  fit();
  addTurn(last());
  answer();
}

function stop() { if (running) running.abort(); box.focus(); }

function again() {
  if (running) return;
  if (messages.length && last().role === "assistant") messages.pop();
  draw();
  if (messages.length) answer();
  box.focus();
}

function edit() {
  if (running) return;
  if (messages.length && last().role === "assistant") messages.pop();
  if (messages.length && last().role === "user") box.value = plain(messages.pop().content);
  draw();
  fit();
  box.focus();
}

function clear() { if (!running) { messages = []; draw(); box.focus(); } }

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ messages }, null, 1)], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  box.focus();
}

async function load(file) {
  try {
    const loaded = JSON.parse(await file.text()).messages;
    const good = part => ["text", "python", "python_output"].includes(part.type) && typeof part.text === "string";
    if (!loaded.length || !loaded.every(m => ["system", "user", "assistant"].includes(m.role) && (typeof m.content === "string" || m.content.every(good)))) throw new Error();
    messages = loaded.map(m => ({ role: m.role, content: m.content }));
    draw();
  } catch { tell("error", "This file is no conversation: choose one that Save wrote."); update(); }
  box.focus();
}

function askForKey() {
  delete sessionStorage.apiKey;
  $("keys").hidden = false;
  $("key").focus();
}

$("keys").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.apiKey = $("key").value.trim();
  $("key").value = "";
  $("keys").hidden = true;
  if (messages.length && last().role === "user") again();
  box.focus();
});
$("form").addEventListener("submit", event => { event.preventDefault(); send(); });
box.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); } });
document.addEventListener("keydown", event => { if (event.key === "Escape") stop(); });
box.addEventListener("input", fit);
for (const [id, action] of Object.entries({ stop, again, edit, clear, save })) $(id).addEventListener("click", action);
$("load").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { if ($("file").files[0]) load($("file").files[0]); $("file").value = ""; });
$("temperature").addEventListener("input", () => { $("shown").textContent = Number($("temperature").value).toFixed(2); });

async function health() {
  try {
    const state = await (await fetch(here + "health")).json();
    if (state.error) throw new Error(state.error.message);
    limits = state.limits || {};
    base = state.stage === "base";
    $("model").textContent = state.model + (state.status === "ready" ? "" : ": " + state.status) + (base ? " \u2014 a base model, which only goes on with a text" : "");
    if (base) box.placeholder = "Begin a text";
    if (!["ready", "degraded"].includes(state.status)) setTimeout(health, 2000);
  } catch (error) {
    const unreachable = error instanceof TypeError || error instanceof SyntaxError;
    $("model").textContent = unreachable ? "the server cannot be reached" : error.message;
    setTimeout(health, 5000);
  }
}

$("temperature").dispatchEvent(new Event("input"));
update();
health();
box.focus();
