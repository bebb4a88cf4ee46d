// The browser of samples: a list that draws only what is seen of it, and one sample in full beside it.

const parsed = new Map();
/** A run's samples, read when they are first asked for. */
function samplesOf(number) {
  if (!parsed.has(number)) {
    const source = document.getElementById(`samples-${number}`);
    const found = source && JSON.parse(source.textContent);
    if (found) {
      found.at = []; // where a sample stands among those of its step that are here
      found.step.forEach((step, i) => found.at.push(i && found.step[i - 1] === step ? found.at[i - 1] + 1 : 0));
      found.plain = found.prompts.map((parts) => parts.map(([, text]) => text).join("\n"));
      found.low = found.completion.map((text) => text.toLowerCase());
      found.lowPrompts = found.plain.map((text) => text.toLowerCase());
    }
    parsed.set(number, found);
  }
  return parsed.get(number);
}

/** A block of tokens, unpacked when it is first asked for. */
async function unpacked(id) {
  const source = document.getElementById(id);
  if (!source) return null;
  const bytes = Uint8Array.from(atob(source.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const tokenBlocks = new Map();
/** A sample's pieces with the values of their tokens; null if a run kept no tokens. */
async function tokensOf(number, i) {
  const samples = samplesOf(number);
  const id = `tokens-${number}-${samples.step[i]}`;
  if (!tokenBlocks.has(id)) tokenBlocks.set(id, unpacked(id));
  const found = (await tokenBlocks.get(id))?.[samples.at[i]];
  if (!found) return null;
  const [pieces, logprobs, advantages] = found;
  const [texts, counts] = samples.pieces;
  let token = 0;
  return pieces.map((piece) => {
    const from = token;
    token += counts[piece];
    const own = logprobs.slice(from, token);
    const credited = Array.isArray(advantages) ? advantages.slice(from, token) : own.map((p) => (p === null ? null : advantages));
    return { text: texts[piece], logprobs: own, advantages: credited };
  });
}

const ONLY = {
  all: "all",
  better: "advantage above 0",
  worse: "advantage below 0",
  cut: "cut off",
  unscored: "unscored or failed",
};
const filter = { step: "all", words: "", low: "", high: "", only: "all", sort: "", down: false };
let picked = 0;

/** Which samples pass, in the order that was asked for. */
function passing(samples) {
  const words = filter.words.toLowerCase();
  const [low, high] = [filter.low, filter.high].map((text) => (text === "" ? null : Number(text)));
  const kept = [];
  for (let i = 0; i < samples.step.length; i++) {
    const reward = samples.reward[i];
    if (filter.step !== "all" && samples.step[i] !== Number(filter.step)) continue;
    if (low !== null && !(reward !== null && reward >= low)) continue;
    if (high !== null && !(reward !== null && reward <= high)) continue;
    if (filter.only === "better" && !(samples.advantage[i] > 0)) continue;
    if (filter.only === "worse" && !(samples.advantage[i] < 0)) continue;
    if (filter.only === "cut" && samples.stopped[i]) continue;
    if (filter.only === "unscored" && reward !== null && !samples.fault[i]) continue;
    if (words && !samples.low[i].includes(words) && !samples.lowPrompts[samples.prompt[i]].includes(words)) continue;
    kept.push(i);
  }
  if (filter.sort) {
    const values = samples[filter.sort];
    const sign = filter.down ? -1 : 1;
    const at = (i) => values[i] ?? -Infinity;
    kept.sort((a, b) => sign * (at(a) === at(b) ? 0 : at(a) < at(b) ? -1 : 1) || a - b);
  }
  return kept;
}

const ROW = 30;
/** A list of any length of which only what is in sight is in the document. */
function virtualList(row, pick) {
  const rows = el("div", { class: "rows" });
  const node = el("div", { class: "list", role: "listbox", tabIndex: 0, "aria-label": "Samples" }, rows);
  let items = [];
  const draw = () => {
    const first = Math.max(0, Math.floor(node.scrollTop / ROW) - 10);
    const last = Math.min(items.length, first + Math.ceil((node.clientHeight || 400) / ROW) + 20);
    rows.style.height = `${items.length * ROW}px`;
    rows.replaceChildren(
      ...items.slice(first, last).map((item, i) => {
        const line = row(item);
        line.style.transform = `translateY(${(first + i) * ROW}px)`;
        return line;
      }),
    );
  };
  node.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  node.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || !items.length) return;
    event.preventDefault();
    const at = Math.min(items.length - 1, Math.max(0, items.indexOf(picked) + by));
    node.scrollTop = Math.min(Math.max(node.scrollTop, (at + 1) * ROW - node.clientHeight), at * ROW);
    pick(items[at]);
  });
  new ResizeObserver(draw).observe(node);
  const fill = (given) => {
    items = given;
    node.scrollTop = 0;
    draw();
  };
  return { node, fill, draw };
}

/** How strongly a value is tinted; blue is good or likely, orange bad. */
function tint(span, value, limit) {
  const strength = Math.min(1, Math.abs(value) / (limit || 1));
  const shade = value >= 0 ? "--good" : "--bad";
  span.style.backgroundColor = `color-mix(in srgb, ${style(shade)} ${Math.round(strength * 65)}%, transparent)`;
}

const mean = (values) => {
  const numbers = values.filter((value) => value !== null);
  return numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : null;
};
const SURPRISE = 5; // nats at which a token's colour is full

/** A completion, its tokens coloured by what was chosen as soon as they are unpacked. */
function completion(number, i) {
  const text = el("div", { class: "text", id: "completion" }, samplesOf(number).completion[i]);
  const key = el("div", { class: "keys" });
  if (state.colour !== "nothing") tokensOf(number, i).then((tokens) => colour(text, key, tokens));
  return [text, key];
}

function colour(text, key, tokens) {
  if (!tokens) {
    key.textContent = "No tokens were kept of this sample, so it has no colours; its advantage stands above.";
    return;
  }
  const values = tokens.map((token) => mean(token[state.colour === "advantage" ? "advantages" : "logprobs"]));
  const known = values.filter((value) => value !== null);
  const limit = state.colour === "advantage" ? known.reduce((most, value) => Math.max(most, Math.abs(value)), 0) : SURPRISE;
  const spans = tokens.map((token, t) => {
    const span = el("span", { class: told(token) ? "told" : "token" }, token.text);
    if (values[t] !== null) tint(span, state.colour === "advantage" ? values[t] : Math.min(0, values[t]), limit);
    span.dataset.t = t;
    return span;
  });
  text.replaceChildren(...spans);
  text.addEventListener("mousemove", (event) => {
    const token = tokens[event.target.dataset.t];
    if (token) say(event, ...described(token));
    else hush();
  });
  text.addEventListener("mouseleave", hush);
  if (known.length && limit) key.append(...scale(limit));
  else if (known.length) key.append("The advantage of every token is 0.");
  else key.append(`No ${state.colour} was kept of these tokens; the sample's advantage stands above.`);
  if (tokens.some(told)) key.append(el("span", { class: "told" }, "what it was told"));
}

/** Whether the policy did not write this, but was told it. */
const told = (token) => token.logprobs.every((p) => p === null);

/** A token in words. */
function described({ text, logprobs, advantages }) {
  const chance = (p) => (p === null ? "not the policy's own" : `${p} (${brief(100 * Math.exp(p))}%)`);
  const rows = logprobs.map((p, n) => [["log-probability", chance(p)], ["advantage", brief(advantages[n])]]).flat();
  return [el("b", {}, JSON.stringify(text)), el("table", {}, rows.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", { class: "value" }, value))))];
}

/** The meaning of colours. */
function scale(limit) {
  const ends = state.colour === "advantage" ? [-limit, 0, limit] : [-limit, 0];
  return ends.map((value) => {
    const mark = el("span", { class: "token" }, value > 0 ? `+${brief(value)}` : brief(value));
    tint(mark, value, limit);
    return mark;
  });
}

/** Two texts in one: what only the first says struck through, what only the second says marked. */
function difference(before, after) {
  if (before === after) return [el("p", { class: "soft" }, "Both say the same.")];
  const parts = Diff.diffWordsWithSpace(before, after, { timeout: 1500 });
  if (!parts) return [el("p", { class: "soft" }, "The two are too long and too different to be compared here.")];
  const marked = parts.map((part) => el(part.added ? "ins" : part.removed ? "del" : "span", {}, part.value));
  return [el("div", { class: "text", id: "difference" }, marked), el("div", { class: "keys" }, el("del", {}, "only there"), el("ins", {}, "only here"))];
}

/** Every sample of the same prompt, in any run. */
function siblings(prompt) {
  return runs.flatMap((run) => {
    const samples = samplesOf(run.number);
    if (!samples) return [];
    const same = samples.plain.indexOf(prompt);
    return same < 0 ? [] : samples.prompt.flatMap((p, i) => (p === same ? [{ run, i, step: samples.step[i], reward: samples.reward[i] }] : []));
  });
}

function samplesSection() {
  const with_ = runs.filter((run) => document.getElementById(`samples-${run.number}`));
  if (!with_.length) return null;
  const number = () => (samplesOf(Number(state.run)) ? Number(state.run) : with_[0].number);
  const counted = el("span", { class: "soft", id: "counted", role: "status" });
  const left = el("p", { class: "soft", id: "left-out" });
  const full = el("article", { class: "full", id: "sample" });
  const stepBox = el("select", { "aria-label": "Step", id: "by-step" });

  const row = (i) => {
    const samples = samplesOf(number());
    const flags = [samples.stopped[i] ? null : "cut off", samples.fault[i] ? "failed" : null].filter(Boolean).join(", ");
    const line = el(
      "div",
      { class: i === picked ? "row picked" : "row", role: "option", "aria-selected": String(i === picked), onclick: () => pick(i) },
      el("span", {}, String(samples.step[i])),
      el("span", {}, brief(samples.reward[i])),
      el("span", {}, brief(samples.advantage[i])),
      el("span", {}, String(samples.length[i])),
      el("span", { class: "words" }, flags ? el("em", {}, flags, " ") : null, el("span", { class: "soft" }, samples.plain[samples.prompt[i]].slice(-80), " "), samples.completion[i].slice(0, 160)),
    );
    return line;
  };
  const list = virtualList(row, (i) => pick(i));

  function pick(i) {
    picked = i;
    list.draw();
    show();
  }

  function show() {
    const samples = samplesOf(number());
    if (picked === null || samples.step[picked] === undefined) {
      full.replaceChildren(el("p", { class: "soft" }, "No sample passes the filters."));
      return;
    }
    const i = picked;
    const prompt = samples.plain[samples.prompt[i]];
    const same = siblings(prompt);
    const beside = same.filter((other) => other.run.number === number() && other.step === samples.step[i]);
    const elsewhere = same.filter((other) => !(other.run.number === number() && other.step === samples.step[i]));
    const facts = [
      ["step", String(samples.step[i])],
      ["prompt", `#${samples.index[i]}`],
      ["reward", String(samples.reward[i] ?? "none")],
      ...samples.rewards[i].map(([name, value]) => [name, String(value ?? "none")]),
      ["advantage", String(samples.advantage[i] ?? "none")],
      ["tokens", String(samples.length[i])],
      ["ended", samples.stopped[i] ? "by itself" : "cut off"],
      ...(samples.fault[i] ? [["fault", samples.fault[i]]] : []),
      ...samples.extras[i],
    ];
    full.replaceChildren(
      el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      el("h3", {}, "Prompt"),
      el("div", { class: "text prompt" }, samples.prompts[samples.prompt[i]].map(([role, text]) => el("div", {}, role ? el("b", { class: "role" }, role) : null, text))),
      el("h3", {}, "Completion", colourBox),
      ...completion(number(), i),
      ...(beside.length > 1 ? [el("h3", {}, `${count(beside.length, "answer")} to this prompt in this step, by reward`), answers(beside, i)] : []),
      ...(elsewhere.length ? [el("h3", {}, "The same prompt elsewhere"), against(samples.completion[i], elsewhere)] : []),
    );
  }

  const answers = (beside, i) =>
    el(
      "div",
      { class: "answers" },
      beside
        .slice()
        .sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity))
        .map((other) => el("button", { class: other.i === i ? "picked" : "", onclick: () => pick(other.i) }, brief(other.reward))),
    );

  /** The difference from another sample of the same prompt, to be chosen. */
  function against(text, others) {
    const box = el("div");
    const name = ({ run, i, step, reward }) => `${runs.length > 1 ? `${run.name}, ` : ""}step ${step}, reward ${brief(reward)}`;
    const select = el("select", { id: "against", "aria-label": "Compare with" }, others.map((other, n) => el("option", { value: n }, name(other))));
    const compare = () => {
      const other = others[select.value];
      const theirs = samplesOf(other.run.number).completion[other.i];
      box.replaceChildren(...difference(theirs, text));
    };
    select.addEventListener("change", compare);
    compare();
    return el("div", {}, select, box);
  }

  function refill(keep) {
    const samples = samplesOf(number());
    const kept = passing(samples);
    counted.textContent = `${kept.length.toLocaleString("en-US")} of ${count(samples.step.length, "sample")}`;
    if (!(keep && kept.includes(picked))) picked = kept.length ? kept[0] : null;
    list.fill(kept);
    show();
  }

  function another() {
    remember();
    const samples = samplesOf(number());
    const steps = [...new Set(samples.step)];
    if (!steps.includes(Number(filter.step))) filter.step = "all";
    stepBox.replaceChildren(el("option", { value: "all" }, "all"), ...steps.map((step) => el("option", { value: step }, step)));
    stepBox.value = filter.step;
    const missing = samples.all - samples.step.length;
    left.hidden = missing === 0;
    left.textContent =
      `${count(samples.step.length, "sample")} of ${samples.all.toLocaleString("en-US")} are on this page, from ${count(steps.length, "step")}: whole groups, of the first and the last step first. ` +
      `${missing.toLocaleString("en-US")} are left out; all of them are in samples.jsonl, and the distributions above count every one.`;
    refill();
  }

  const colourBox = choice("coloured by", "colour", { advantage: "advantage", "log-probability": "log-probability", nothing: "nothing" }, () => {
    remember();
    show();
  });
  const field = (label, id, properties, name) => {
    const input = el("input", { id, ...properties });
    input.addEventListener("input", () => {
      filter[name] = input.value;
      refill();
    });
    return el("label", { class: "choice" }, el("span", {}, label), input);
  };
  stepBox.addEventListener("change", () => {
    filter.step = stepBox.value;
    refill();
  });
  const only = el("select", { id: "only", "aria-label": "Only" }, Object.entries(ONLY).map(([value, words]) => el("option", { value }, words)));
  only.addEventListener("change", () => {
    filter.only = only.value;
    refill();
  });
  const head = el("div", { class: "row head" });
  const heads = { step: "step", reward: "reward", advantage: "adv.", length: "tokens", "": "prompt and completion" };
  const sorting = () =>
    head.replaceChildren(
      ...Object.entries(heads).map(([name, words]) => {
        const mark = filter.sort === name && name ? (filter.down ? " ↓" : " ↑") : "";
        const sort = () => {
          if (filter.sort === name) filter.down = !filter.down;
          else Object.assign(filter, { sort: name, down: name !== "step" && name !== "" });
          sorting();
          refill(true);
        };
        return el("button", { onclick: sort, "data-sort": name }, words + mark);
      }),
    );
  sorting();
  const section = el(
    "section",
    { id: "samples" },
    el("h2", {}, "Samples", with_.length > 1 ? choice("Run", "run", Object.fromEntries(with_.map((run) => [run.number, run.name])), another) : null, counted),
    el(
      "div",
      { class: "filters" },
      el("label", { class: "choice" }, el("span", {}, "step"), stepBox),
      field("says", "by-words", { type: "search", placeholder: "words in prompt or completion" }, "words"),
      field("reward from", "by-low", { type: "number", step: "any" }, "low"),
      field("to", "by-high", { type: "number", step: "any" }, "high"),
      el("label", { class: "choice" }, el("span", {}, "only"), only),
    ),
    left,
    el("div", { class: "browser" }, el("div", { class: "left" }, head, list.node), full),
  );
  listeners.push(() => show());
  another();
  return section;
}
