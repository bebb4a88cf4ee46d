"use strict";
// The data that the page was given, how it is worded, and the few helpers that everything is made with.
// Text reaches the document by textContent alone, whatever it says.

const report = JSON.parse(document.getElementById("report").textContent);

/** An element with properties, and children that are elements or text. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null) node.append(child);
  return node;
}

/** A few digits for a glance; if a figure is to be read, it stands in full. */
function brief(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return Number(value.toPrecision(2)).toExponential();
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

/** A short figure that says the whole one when pointed at. */
const figure = (value) => el("span", { class: "figure", title: value === null ? "not measured" : String(value) }, brief(value));

/** Seconds in words. */
function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;

/** The meaning of a metric, for those that everybody meets. */
const WORDS = {
  "eval/reward": "Held-out reward",
  "reward/mean": "Training reward",
  "eval/accuracy": "Held-out pairs ranked rightly",
  accuracy: "Training pairs ranked rightly",
  "eval/loss": "Held-out loss",
  loss: "Loss",
  "completion/length_mean": "Completion length, tokens",
  "completion/truncated_fraction": "Completions cut off, share",
  "groups/no_spread_fraction": "Groups without spread, share",
  entropy: "Entropy, nats a token",
  kl: "KL from the reference, nats a token",
  "mismatch/mean_abs": "Engine and trainer differ by, nats a token",
  clip_fraction: "Clipped tokens, share",
  "value/explained_variance": "Variance of returns that values explain",
  grad_norm: "Gradient norm",
  learning_rate: "Learning rate",
  "throughput/tokens_per_s": "Tokens a second, whole step",
  "throughput/tail_fraction": "Rollout time with few sequences, share",
  "age/old_fraction": "Tokens that older weights wrote, share",
  "age/old_mean": "Age of these, steps",
  "importance/old_weight_mean": "Importance weight of these",
  "memory/peak_gib": "Peak memory, GiB",
};
/** Metrics that are seen best together, the second dashed. */
const BESIDE = { "mismatch/mean_abs": "mismatch/max_abs", "age/old_mean": "age/max" };
const LOGARITHMIC = new Set(["mismatch/mean_abs"]);
const AXES = { step: "step", time: "training time, s", samples: "completions scored" };
const COLOURS = 8;

/** Runs as they are drawn: each with a colour, dashes if colours come again, and its x by step, time and samples. */
const runs = report.runs.map((run, number) => {
  const { metrics } = run;
  const total = (each) => {
    let sum = 0;
    return metrics.step.map((_, i) => (sum += each(i)));
  };
  const seconds = metrics["time/step"] || [];
  const speed = metrics["throughput/episodes_per_s"] || [];
  const taught = { seconds: metrics["value_init/seconds"] || [], samples: metrics["value_init/episodes"] || [] };
  const x = {
    step: metrics.step || [],
    time: metrics.step ? total((i) => (seconds[i] || 0) + (taught.seconds[i] || 0)) : [],
    samples: metrics.step ? total((i) => Math.round((speed[i] || 0) * (seconds[i] || 0)) + (taught.samples[i] || 0)) : [],
  };
  return { ...run, number, x, dash: number < COLOURS ? [] : [6, 3] };
});
const allMetrics = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))]
  .filter((name) => name !== "step" && runs.some((run) => (run.metrics[name] || []).some((v) => typeof v === "number")))
  .sort();

/** Where a run has a metric: x, values and steps, nothing thinned. */
function points(run, metric, axis) {
  const found = { x: [], y: [], step: [] };
  (run.metrics[metric] || []).forEach((value, i) => {
    if (typeof value !== "number") return;
    found.x.push(run.x[axis][i]);
    found.y.push(value);
    found.step.push(run.metrics.step[i]);
  });
  return found;
}

/** The choices made on the page; they stay in the address, so a reloaded page looks the same. */
const state = { x: "step", smooth: "0", theme: "auto", off: "", detail: "0", metric: "", run: "0", colour: "advantage", follow: "1" };
new URLSearchParams(location.hash.slice(1)).forEach((value, name) => {
  if (name in state) state[name] = value;
});
const off = new Set(state.off.split(",").filter(Boolean).map(Number));
const shownRuns = () => runs.filter((run) => !off.has(run.number));

function remember() {
  state.off = [...off].join(",");
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

/** The functions to call when what is drawn changes. */
const listeners = [];
function redraw() {
  remember();
  for (const listener of listeners) listener();
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (run) => style(`--run-${run.number % COLOURS}`);

/** A choice among a few words. */
function choice(label, name, options, onchange) {
  const select = el("select", { "aria-label": label }, Object.entries(options).map(([value, words]) => el("option", { value }, words)));
  if (!(state[name] in options)) state[name] = Object.keys(options)[0] ?? "";
  select.value = state[name];
  select.addEventListener("change", () => {
    state[name] = select.value;
    onchange();
  });
  return el("label", { class: "choice" }, el("span", {}, label), select);
}

/** The box that says what is under the pointer. */
const tip = el("div", { id: "tip", role: "status" });
tip.hidden = true;
function say(event, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 4))}px`;
}
const hush = () => (tip.hidden = true);
const swatch = (colour) => {
  const mark = el("i", { class: "swatch" });
  mark.style.backgroundColor = colour;
  return mark;
};
