"use strict";
// The engine of the page that holds a model (`nanochat page`): tokenizer, calculator, GPT and
// sampling, as in nanochat.core.tokenizer, model.sandbox, model.gpt and model.engine.
// It runs in a worker. It reads nothing but what the page hands to it, and asks no network.

// ---- the packed model: a header (JSON), and the bytes of all tensors -------------------------

const ARRAYS = { int8: Int8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };

// A tensor as {rows, cols, data, scale}: the weight is data · scale[row], or data without a scale.
function tensor(header, buffer, name) {
  const [kind, rows, cols, offset, scaleAt] = header.tensors[name];
  const data = new ARRAYS[kind](buffer, offset, rows * cols);
  const scale = scaleAt === null ? null : new Float32Array(buffer, scaleAt, rows);
  return { rows, cols, data, scale };
}

// ---- the tokenizer ----------------------------------------------------------------------------

// The split pattern of nanochat.rustbpe.PATTERN. JavaScript has no possessive quantifiers, which
// only save time here. Its \s is not Unicode's White_Space, and (?i:…) is new;
// without regard to case, an s is also the long s.
const PIECES = new RegExp([
  "'(?:[sdmtSDMT\u017f]|[lL][lL]|[vV][eE]|[rR][eE])",
  "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+",
  "\\p{N}{1,2}",
  " ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*",
  "\\p{White_Space}*[\\r\\n]",
  "\\p{White_Space}+(?!\\P{White_Space})",
  "\\p{White_Space}+",
].join("|"), "gu");

class Tokenizer {
  constructor(header, buffer) {
    const merges = tensor(header, buffer, "merges").data; // left, right, left, right, …
    this.bytes = Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte)); // of each id
    this.merged = new Map(); // left · vocab_size + right: the id that they merge into
    this.size = header.config.vocab_size;
    for (let i = 0; i < merges.length; i += 2) {
      const [left, right] = [this.bytes[merges[i]], this.bytes[merges[i + 1]]];
      this.merged.set(merges[i] * this.size + merges[i + 1], this.bytes.length);
      const both = new Uint8Array(left.length + right.length);
      both.set(left);
      both.set(right, left.length);
      this.bytes.push(both);
    }
    this.longest = Math.max(...this.bytes.map(bytes => bytes.length));
    // special tokens have the last ids; no merge makes one, so no text becomes one
    this.special = {};
    for (const name of header.special) {
      this.special[name] = this.bytes.length;
      this.bytes.push(new TextEncoder().encode(name));
    }
  }

  encode(text) {
    const utf8 = new TextEncoder(), ids = [];
    for (const [piece] of text.matchAll(PIECES)) {
      for (const id of this.mergePiece(Array.from(utf8.encode(piece)))) ids.push(id);
    }
    return ids;
  }

  // Merge the pair whose token was learned first, until no pair has a token.
  mergePiece(ids) {
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const id = this.merged.get(ids[i] * this.size + ids[i + 1]);
        if (id < best) [best, at] = [id, i];
      }
      if (at < 0) return ids;
      ids.splice(at, 2, best);
    }
  }

  // The characters that each id completes: an empty string where it completes none.
  texts(ids) {
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    const texts = ids.map(id => utf8.decode(this.bytes[id], { stream: true }));
    if (ids.length) texts[ids.length - 1] += utf8.decode();
    return texts;
  }

  decode(ids) { return this.texts(ids).join(""); }
}

// ---- the chat template, and which old messages are left out ------------------------------------

// A system message goes before the first question.
function withoutSystem(messages) {
  if (messages[0].role !== "system") return messages;
  const [system, question, ...rest] = messages;
  return [{ ...question, content: system.content + "\n\n" + question.content }, ...rest];
}

// The ids of a conversation, up to the point where the assistant speaks.
function renderChat(tokenizer, messages) {
  const { special } = tokenizer, ids = [special["<|bos|>"]];
  for (const { role, content } of withoutSystem(messages)) {
    const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
    ids.push(special[`<|${role}_start|>`]);
    for (const { type, text } of parts) {
      const name = { python: "python", python_output: "output" }[type];
      if (name) ids.push(special[`<|${name}_start|>`]);
      for (const id of tokenizer.encode(text)) ids.push(id);
      if (name) ids.push(special[`<|${name}_end|>`]);
    }
    ids.push(special[`<|${role}_end|>`]);
  }
  ids.push(special["<|assistant_start|>"]);
  return ids;
}

function tooLong(tokens, room) {
  return new Error(`the message has ${tokens} tokens and the model has room for ${room}: ` +
    "shorten it.");
}

// Leave out the messages before which the newer ones are longer than `room` tokens already, which
// is known without reading them.
function newest(tokenizer, messages, room) {
  const length = content => typeof content === "string" ? content.length
    : content.reduce((sum, part) => sum + part.text.length, 0);
  let start = messages.length, least = 0;
  while (start > 1 && least <= room) {
    least += 2 + Math.ceil(length(messages[--start].content) / tokenizer.longest);
  }
  return [messages[0], ...messages.slice(start - (start + 1) % 2)];
}

// The prompt that fits into `room` tokens, and how many old messages were left out.
function fitChat(tokenizer, messages, room) {
  const text = messages[messages.length - 1].content;
  const least = Math.ceil(text.length / tokenizer.longest); // known without reading it
  if (least > room) throw tooLong(`at least ${least}`, room);
  const read = new Map(); // each try renders the same messages
  const encode = text => read.get(text) ?? read.set(text, tokenizer.encode(text)).get(text);
  const before = messages.length;
  messages = newest(tokenizer, messages, room);
  for (;;) {
    const ids = renderChat({ special: tokenizer.special, encode }, messages);
    if (ids.length <= room) return { ids, leftOut: before - messages.length };
    if (messages.length >= 4) messages = [messages[0], ...messages.slice(3)];
    else if (messages.length > 1) messages = messages.slice(-1);
    else throw tooLong(ids.length, room);
  }
}

// ---- the calculator: exact, with fractions {n, d} of two BigInt, as in nanochat.model.sandbox ----

const STRING = String.raw`("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')`;
const DIGITS = "[0-9](?:_?[0-9])*";
const PIECE = new RegExp(
  String.raw`\s*(?:${STRING}\s*\.\s*count\s*\(\s*${STRING}\s*\)` +
  String.raw`|((?:${DIGITS}(?:,[0-9]{3}(?![0-9]))*(?:\.(?:${DIGITS})?)?|\.${DIGITS})` +
  String.raw`(?:[eE][\-+]?${DIGITS})?)` +
  String.raw`|(\*\*|\/\/|[\-+*\/%()−×÷]))`, "yu");
const ESCAPES = { "\\": "\\", "'": "'", '"': '"', n: "\n", t: "\t" };
const SAME = { "−": "-", "×": "*", "÷": "/" };

function refuse() { throw new SyntaxError("not an expression of the calculator"); }

const size = n => n < 0n ? -n : n;

// n/d in lowest terms, if it is within bounds.
function fraction(n, d = 1n) {
  if (!d) refuse();
  let a = size(n), b = size(d);
  while (b) [a, b] = [b, a % b];
  if (d < 0n) a = -a;
  [n, d] = [n / a, d / a];
  if (size(n) > 10n ** 18n * d || d > 10n ** 400n) refuse();
  return { n, d };
}

// Digits of n/d > 0, rounded half to even; the first one stands for 10 ** place.
function decimals(n, d, precision) {
  let place = String(n).length - String(d).length;
  if (place >= 0 ? n < d * 10n ** BigInt(place) : n * 10n ** BigInt(-place) < d) place--;
  const shift = precision - 1 - place;
  if (shift >= 0) n *= 10n ** BigInt(shift);
  else d *= 10n ** BigInt(-shift);
  let digits = n / d;
  const rest = 2n * (n % d);
  if (rest > d || rest === d && digits % 2n) digits++;
  const text = String(digits);
  if (text.length > precision) place++; // 9.99… became 10
  return { digits: text.replace(/0+$/, ""), place, exact: !rest };
}

function toNumber({ n, d }) {
  if (!n) return 0;
  const { digits, place } = decimals(size(n), d, 40);
  return Number(`${n < 0n ? "-" : ""}${digits[0]}.${digits.slice(1)}e${place}`);
}

// A Number is a whole number over a power of 2.
function fromNumber(value) {
  if (!Number.isFinite(value)) refuse();
  let d = 1n;
  while (!Number.isInteger(value)) [value, d] = [2 * value, 2n * d];
  return fraction(BigInt(value), d);
}

function power(a, b) {
  if (size(b.n) > 64n * b.d) refuse();
  if (b.d !== 1n) return fromNumber(toNumber(a) ** toNumber(b));
  return b.n < 0n ? fraction(a.d ** -b.n, a.n ** -b.n) : fraction(a.n ** b.n, a.d ** b.n);
}

function floor(a, b) { // of the quotient
  const n = a.n * b.d, d = a.d * b.n;
  if (!d) refuse();
  return { n: n / d - (n % d && n < 0n !== d < 0n ? 1n : 0n), d: 1n };
}

const minus = (a, b) => fraction(a.n * b.d - b.n * a.d, a.d * b.d);
const times = (a, b) => fraction(a.n * b.n, a.d * b.d);

const OPERATORS = { // operator: how strongly it binds, its function
  "+": [1, (a, b) => fraction(a.n * b.d + b.n * a.d, a.d * b.d)], "-": [1, minus],
  "*": [2, times], "/": [2, (a, b) => fraction(a.n * b.d, a.d * b.n)],
  "//": [2, (a, b) => fraction(floor(a, b).n)],
  "%": [2, (a, b) => { // a - b * whole: the product may be out of bounds
    const whole = floor(a, b).n;
    return fraction(a.n * b.d - b.n * whole * a.d, a.d * b.d);
  }],
  "**": [3, power],
};

function fromDigits(text) {
  const [, digits, part, exponent] = /^(\d*)\.?(\d*)(?:[eE](.*))?$/.exec(text.replace(/[,_]/g, ""));
  const all = (digits + part).replace(/^0+(?=.)/, ""), places = Number(exponent ?? 0) - part.length;
  if (Math.abs(all.length - 1 + places) > 400) refuse();
  if (places >= 0) return fraction(BigInt(all) * 10n ** BigInt(places));
  return fraction(BigInt(all), 10n ** BigInt(-places));
}

const textOf = literal => literal.slice(1, -1).replace(/\\([nt\\'"])/g, (_, c) => ESCAPES[c]);

function counted(text, part) {
  return fraction(BigInt(part ? text.split(part).length - 1 : [...text].length + 1));
}

function pieces(expression) { // fractions, operators and brackets
  const found = [];
  PIECE.lastIndex = 0;
  while (PIECE.lastIndex < expression.length) {
    const [, text, part, digits, sign] = PIECE.exec(expression) ?? refuse();
    if (text) found.push(counted(textOf(text), textOf(part)));
    else found.push(digits ? fromDigits(digits) : SAME[sign] ?? sign);
  }
  return found;
}

function operand(rest) { // the first of the pieces that are left
  const piece = rest.shift();
  if (piece === "-") {
    const { n, d } = evaluate(rest, 3);
    return { n: -n, d };
  }
  if (piece === "+") return evaluate(rest, 3);
  if (piece === "(") {
    const value = evaluate(rest);
    return rest.shift() === ")" ? value : refuse();
  }
  return typeof piece === "object" ? piece : refuse();
}

function evaluate(rest, least = 1) { // stop at an operator that binds less than this
  let value = operand(rest);
  while (OPERATORS[rest[0]]?.[0] >= least) {
    const [level, work] = OPERATORS[rest.shift()];
    value = work(value, evaluate(rest, Math.min(level + 1, 3)));
  }
  return value;
}

function written({ n, d }) {
  if (d === 1n) return String(n);
  const whole = String(size(n) / d).length;
  let found = decimals(size(n), d, 20);
  if (!found.exact) found = decimals(size(n), d, Math.max(10, whole + 2));
  const { digits, place } = found, sign = n < 0n ? "-" : "";
  if (place < -10) return `${sign}${digits[0]}${digits[1] ? "." : ""}${digits.slice(1)}e${place}`;
  if (place < 0) return `${sign}0.${"0".repeat(-place - 1)}${digits}`;
  const before = digits.padEnd(place + 1, "0"), after = before.slice(place + 1);
  return `${sign}${before.slice(0, place + 1)}${after ? "." : ""}${after}`;
}

// The result of what the model wrote between <|python_start|> and <|python_end|>, as text; null
// where it is no expression. It is never run as code.
function calculate(expression) {
  const text = expression.trim();
  let nesting = 0;
  const nested = [...text].some(c => (nesting += (c === "(") - (c === ")")) > 20);
  if ([...text].length > 200 || nested) return null;
  try {
    const rest = pieces(text), value = evaluate(rest);
    return rest.length ? null : written(value);
  } catch (error) {
    if (error instanceof SyntaxError) return null;
    throw error;
  }
}

// ---- the model --------------------------------------------------------------------------------

// out[r] = the product of row r with x. Four sums, so that no addition waits for the one before.
function multiply({ rows, cols, data, scale }, x, out) {
  const even = cols - cols % 4;
  for (let row = 0, at = 0; row < rows; row++) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < even; i += 4, at += 4) {
      a += data[at] * x[i];
      b += data[at + 1] * x[i + 1];
      c += data[at + 2] * x[i + 2];
      d += data[at + 3] * x[i + 3];
    }
    for (let i = even; i < cols; i++, at++) a += data[at] * x[i];
    out[row] = (a + b + c + d) * (scale ? scale[row] : 1);
  }
}

// Gates read a few channels. They have a function of their own, because V8 compiles one that sees
// two kinds of array to slower code.
function gate({ cols, data }, row, x) {
  let sum = 0;
  for (let i = 0; i < cols; i++) sum += data[row * cols + i] * x[i];
  return 1 / (1 + Math.exp(-sum));
}

function lookUp({ cols, data, scale }, row, out) {
  const factor = scale ? scale[row] : 1;
  for (let i = 0; i < cols; i++) out[i] = data[row * cols + i] * factor;
}

// RMSNorm without weights, of the channels from `start` to `end`, in place.
function norm(x, start, end) {
  let squares = 0;
  for (let i = start; i < end; i++) squares += x[i] * x[i];
  const factor = 1 / Math.sqrt(squares / (end - start) + 1e-6);
  for (let i = start; i < end; i++) x[i] *= factor;
}

class GPT {
  constructor(header, buffer) {
    const c = this.config = header.config;
    const matrix = name => name in header.tensors ? tensor(header, buffer, name) : null;
    this.headDim = c.n_embd / c.n_head;
    this.kvChannels = c.n_kv_head * this.headDim;
    this.wte = matrix("transformer.wte.weight");
    this.head = matrix("lm_head.weight");
    this.layers = Array.from({ length: c.n_layer }, (_, i) => this.layer(i, matrix));
    this.smearGate = matrix("smear_gate.weight");
    const number = name => matrix(name)?.data[0];
    [this.smear, this.backout] = [number("smear_lambda"), number("backout_lambda")];
    this.scales = [matrix("resid_lambdas")?.data, matrix("x0_lambdas")?.data];
    this.rotations = this.rotationTable();
    const zeros = n => new Float64Array(n);
    // the stream and what is made of it; the names are those of nanochat.model.gpt
    [this.x, this.x0, this.before, this.middle] = [1, 2, 3, 4].map(() => zeros(c.n_embd));
    [this.normed, this.y, this.added] = [1, 2, 3].map(() => zeros(c.n_embd));
    [this.q, this.inner, this.logits] = [c.n_embd, 4 * c.n_embd, c.vocab_size].map(zeros);
    [this.k, this.v, this.ve] = [1, 2, 3].map(() => zeros(this.kvChannels));
    this.weights = zeros(c.sequence_len); // of one head's attention
    this.tokens = []; // those that the cache holds
  }

  layer(i, matrix) {
    const c = this.config, of = name => matrix(`transformer.h.${i}.${name}.weight`);
    const cache = () => new Float32Array(c.sequence_len * this.kvChannels);
    return {
      q: of("attn.c_q"), k: of("attn.c_k"), v: of("attn.c_v"), out: of("attn.c_proj"),
      up: of("mlp.c_fc"), down: of("mlp.c_proj"),
      ve: matrix(`value_embeds.${i}.weight`), veGate: of("attn.ve_gate"), window: c.windows[i],
      keys: cache(), values: cache(), ownKeys: c.key_offset ? cache() : null,
      looked: null, // the attention weights of the last token, a row for each head, if recorded
    };
  }

  // Cosines, then sines, of every position.
  rotationTable() {
    const { sequence_len: length, rope_base: base } = this.config, pairs = this.headDim / 2;
    const table = new Float32Array(length * 2 * pairs);
    for (let at = 0; at < length; at++) {
      for (let i = 0; i < pairs; i++) {
        const angle = at * base ** (-2 * i / this.headDim);
        table[2 * pairs * at + i] = Math.cos(angle);
        table[2 * pairs * at + pairs + i] = Math.sin(angle);
      }
    }
    return table;
  }

  // Rotate and norm each head of queries or keys.
  rotate(x, position) {
    const pairs = this.headDim / 2, cos = 2 * pairs * position, sin = cos + pairs;
    for (let start = 0; start < x.length; start += this.headDim) {
      for (let i = start, j = 0; j < pairs; i++, j++) {
        const [a, b] = [x[i], x[i + pairs]];
        x[i] = a * this.rotations[cos + j] + b * this.rotations[sin + j];
        x[i + pairs] = b * this.rotations[cos + j] - a * this.rotations[sin + j];
      }
      norm(x, start, start + this.headDim);
    }
  }

  // The embedding of a token, with a share of the previous one's.
  embed(token) {
    const { x, before } = this, last = this.tokens.length - 1;
    lookUp(this.wte, token, x);
    norm(x, 0, x.length);
    if (this.smearGate && last >= 0) {
      lookUp(this.wte, this.tokens[last], before);
      norm(before, 0, x.length);
      const share = this.smear * gate(this.smearGate, 0, x);
      for (let i = 0; i < x.length; i++) x[i] += share * before[i];
    }
    this.x0.set(x);
  }

  // Keys and values of a token for one layer, into its cache.
  store(layer, token) {
    const { k, v, ve } = this, position = this.tokens.length, at = position * this.kvChannels;
    multiply(layer.k, this.normed, k);
    multiply(layer.v, this.normed, v);
    this.rotate(k, position);
    if (layer.ve) {
      lookUp(layer.ve, token, ve);
      for (let head = 0, i = 0; head < this.config.n_kv_head; head++) {
        const share = 3 * gate(layer.veGate, head, this.normed);
        for (const end = i + this.headDim; i < end; i++) v[i] += share * ve[i];
      }
    }
    layer.values.set(v, at);
    if (layer.ownKeys) this.offset(layer, at);
    layer.keys.set(k, at);
  }

  // The slowly rotating half of each key's channels comes from the token before.
  offset(layer, at) {
    const pairs = this.headDim / 2, fast = Math.floor(pairs / 2);
    layer.ownKeys.set(this.k, at);
    for (let i = 0; i < this.kvChannels; i++) {
      if (i % pairs >= fast) this.k[i] = at ? layer.ownKeys[at - this.kvChannels + i] : 0;
    }
  }

  attend(layer) {
    const { q, y, weights, headDim, kvChannels: step, config: c } = this;
    const end = this.tokens.length + 1, first = Math.max(0, end - 1 - layer.window);
    const scale = c.qk_scale ** 2 / Math.sqrt(headDim), group = c.n_head / c.n_kv_head;
    y.fill(0);
    for (let head = 0; head < c.n_head; head++) {
      const own = head * headDim, shared = Math.floor(head / group) * headDim;
      let most = -Infinity, total = 0;
      for (let t = first; t < end; t++) {
        let score = 0;
        const at = t * step + shared;
        for (let i = 0; i < headDim; i++) score += q[own + i] * layer.keys[at + i];
        weights[t] = score * scale;
        if (weights[t] > most) most = weights[t];
      }
      for (let t = first; t < end; t++) total += weights[t] = Math.exp(weights[t] - most);
      for (let t = first; t < end; t++) {
        const at = t * step + shared, weight = weights[t] /= total;
        for (let i = 0; i < headDim; i++) y[own + i] += weight * layer.values[at + i];
      }
      if (layer.looked) {
        layer.looked[head] = Array.from(weights.subarray(0, end), (w, t) => t < first ? 0 : w);
      }
    }
  }

  // One layer: attention, then the MLP; each adds to the stream.
  block(layer, i, token) {
    const { x, x0, normed, added, inner, scales: [own, first] } = this;
    if (own) for (let j = 0; j < x.length; j++) x[j] = own[i] * x[j] + first[i] * x0[j];
    normed.set(x);
    norm(normed, 0, x.length);
    multiply(layer.q, normed, this.q);
    this.rotate(this.q, this.tokens.length);
    this.store(layer, token);
    this.attend(layer);
    multiply(layer.out, this.y, added);
    for (let j = 0; j < x.length; j++) normed[j] = x[j] += added[j];
    norm(normed, 0, x.length);
    multiply(layer.up, normed, inner);
    for (let j = 0; j < inner.length; j++) inner[j] = inner[j] > 0 ? inner[j] * inner[j] : 0;
    multiply(layer.down, inner, added);
    for (let j = 0; j < x.length; j++) x[j] += added[j];
  }

  // Read one more token. The stream is ready for `predict`.
  read(token) {
    const { x, middle, layers } = this;
    this.embed(token);
    layers.forEach((layer, i) => {
      this.block(layer, i, token);
      if (i === Math.floor(layers.length / 2)) middle.set(x);
    });
    this.tokens.push(token);
  }

  // The logits of the token after the last one that was read.
  predict() {
    const { x, normed, logits, middle, config: { softcap } } = this;
    const share = this.backout ?? 0;
    for (let i = 0; i < x.length; i++) normed[i] = x[i] - share * middle[i];
    norm(normed, 0, x.length);
    for (let i = 0; i < x.length; i++) normed[i] /= softcap;
    multiply(this.head, normed, logits);
    for (let i = 0; i < logits.length; i++) logits[i] = softcap * Math.tanh(logits[i]);
    return logits;
  }

  // Forget what does not begin the prompt; returns how many of its tokens are known. At least one
  // is left to read.
  keep(prompt) {
    let same = 0;
    while (same < prompt.length - 1 && this.tokens[same] === prompt[same]) same++;
    this.tokens.length = same;
    return same;
  }
}

// ---- drawing tokens ---------------------------------------------------------------------------

// The ids of the k largest logits, the largest first.
function largest(logits, k) {
  const ids = [];
  for (let id = 0; id < logits.length; id++) {
    if (ids.length === k && logits[id] <= logits[ids[k - 1]]) continue;
    let at = ids.length;
    while (at > 0 && logits[id] > logits[ids[at - 1]]) at--;
    ids.splice(at, 0, id);
    if (ids.length > k) ids.pop();
  }
  return ids;
}

// Draw from the top k tokens (0: from all). Temperature 0 takes the most likely one.
function draw(logits, temperature, topK, uniform) {
  if (temperature < 1e-3) return largest(logits, 1)[0];
  const all = topK === 0 || topK >= logits.length;
  const ids = all ? Array.from(logits.keys()) : largest(logits, topK);
  let most = -Infinity, total = 0;
  for (const id of ids) most = Math.max(most, logits[id]);
  const sums = ids.map(id => total += Math.exp((logits[id] - most) / temperature));
  const at = sums.findIndex(sum => sum > uniform * total);
  return ids[at < 0 ? ids.length - 1 : at];
}

// The logarithm of the sum of exp: logits[i] - this is the log-probability of token i.
function logSum(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  return most + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - most), 0));
}

// ---- answers ----------------------------------------------------------------------------------

class Engine {
  constructor(header, buffer) {
    this.header = header;
    this.tokenizer = new Tokenizer(header, buffer);
    this.model = new GPT(header, buffer);
    this.sequence = []; // prompt and answer, as far as it has come
  }

  // Yield each token of an answer: {id, forced, logprob, top, finish}. The calculator's results
  // are forced. `yield null` while the prompt is read: the caller may stop then, too.
  * generate(prompt, { temperature, topK, maxTokens, tools, nTop, random = Math.random }) {
    const { special } = this.tokenizer, { sequence_len: context } = this.model.config;
    const room = Math.min(maxTokens, context - prompt.length);
    const forced = [], call = { code: null };
    let logits;
    this.sequence = [...prompt];
    for (const token of prompt.slice(this.model.keep(prompt))) {
      this.model.read(token);
      yield null;
    }
    for (let n = 1; ; n++) {
      let event = { id: forced.shift(), forced: true, logprob: 0, top: [] };
      if (event.id === undefined) {
        logits = this.model.predict();
        event = this.choose(logits, temperature, topK, nTop, random());
        const ends = [special["<|assistant_end|>"], special["<|bos|>"]].includes(event.id);
        if (ends) event.finish = "stop";
        else if (tools) forced.push(...this.listen(call, event.id));
      }
      this.sequence.push(event.id);
      if (!event.finish && n === room) event.finish = "length";
      yield event;
      if (event.finish) return;
      this.model.read(event.id);
    }
  }

  choose(logits, temperature, topK, nTop, uniform) {
    const id = draw(logits, temperature, topK, uniform), sum = logSum(logits);
    const top = nTop ? largest(logits, nTop).map(other => [other, logits[other] - sum]) : [];
    return { id, forced: false, logprob: logits[id] - sum, top };
  }

  // Collect a call of the calculator; at its end, return the tokens of the result.
  listen(call, id) {
    const { special } = this.tokenizer;
    if (id === special["<|python_start|>"]) call.code = [];
    else if (call.code && id !== special["<|python_end|>"]) call.code.push(id);
    else if (call.code) {
      const result = calculate(this.tokenizer.decode(call.code));
      call.code = null;
      if (result === null) return [];
      const inside = this.tokenizer.encode(result);
      return [special["<|output_start|>"], ...inside, special["<|output_end|>"]];
    }
    return [];
  }

  // Where the model looked when it chose the token at a place of the last answer: the texts of the
  // tokens before it, and for each layer and head their weights.
  look(place) {
    const { model, tokenizer } = this, before = this.sequence.slice(0, place);
    model.tokens.length = Math.min(model.tokens.length, place - 1);
    for (const token of before.slice(model.tokens.length, -1)) model.read(token);
    for (const layer of model.layers) layer.looked = [];
    model.read(before[place - 1]);
    const weights = model.layers.map(layer => layer.looked);
    for (const layer of model.layers) layer.looked = null;
    return { texts: before.map(id => tokenizer.decode([id])), weights };
  }

  // The prompt of a request: a conversation, or for a base model a text to continue.
  prompt({ messages, text, maxTokens }) {
    const { tokenizer, model: { config: { sequence_len: context } } } = this;
    if (messages) {
      return fitChat(tokenizer, messages, context - Math.min(maxTokens, Math.floor(context / 2)));
    }
    if (text.length > context * tokenizer.longest) throw tooLong("too many", context - 1);
    const ids = [tokenizer.special["<|bos|>"], ...tokenizer.encode(text)];
    if (ids.length >= context) throw tooLong(ids.length, context - 1);
    return { ids, leftOut: 0 };
  }
}
