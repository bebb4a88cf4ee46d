// The page, put together from top to bottom.

const last = (run, metric) => points(run, metric, "step").y.at(-1) ?? null;
const stepsOf = (run) => (run.metrics["time/step"] || []).filter((v) => typeof v === "number").length;

/** The main facts of each run, a row each. */
function overview() {
  const held = ["eval/reward", "eval/accuracy", "eval/loss"].find((metric) => allMetrics.includes(metric));
  const training = ["reward/mean", "accuracy", "loss"].find((metric) => allMetrics.includes(metric));
  const ends = (run, metric) => {
    const { y } = points(run, metric, "step");
    return y.length ? [figure(y[0]), " → ", figure(y.at(-1))] : ["–"];
  };
  const heads = ["run", "algorithm", "steps", held && WORDS[held], training && WORDS[training], "training time", "tokens/s", "peak GiB", "warnings"].filter(Boolean);
  const rows = runs.map((run) => {
    const speed = points(run, "throughput/tokens_per_s", "step").y.toSorted((a, b) => a - b);
    const cells = [
      el("span", { class: "run" }, swatch(colourOf(run)), run.name),
      run.algorithm,
      `${stepsOf(run)} of ${run.planned}`,
      held && ends(run, held),
      training && ends(run, training),
      duration(run.x.time.at(-1) ?? 0),
      speed.length ? el("span", { title: "median of the steps" }, brief(speed[speed.length >> 1])) : "–",
      figure(most(run, "memory/peak_gib")),
      String(run.remarks.length || "none"),
    ];
    return el("tr", {}, cells.filter((cell) => cell !== undefined).map((cell, i) => el("td", { "data-head": heads[i] }, cell)));
  });
  listeners.push(() => rows.forEach((row, i) => (row.querySelector(".swatch").style.backgroundColor = colourOf(runs[i]))));
  return el("section", { id: "runs" }, table(heads, rows));
}

/** The largest of a metric's values; null if it has none. */
const most = (run, name) => points(run, name, "step").y.reduce((a, b) => Math.max(a ?? b, b), null);

const table = (heads, rows) =>
  el("div", { class: "scroll" }, el("table", { class: "data" }, el("thead", {}, el("tr", {}, heads.map((head) => el("th", {}, head)))), el("tbody", {}, rows)));

/** The warnings: what went wrong, where, and what to try. */
function warnings() {
  const found = runs.flatMap((run) => run.remarks.map((remark) => ({ run, ...remark })));
  if (!found.length) return null;
  const span = ({ first, last: end, count: n }) => (n === 1 ? `step ${first}` : `${count(n, "step")}, ${first} to ${end}`);
  const items = found.map((remark) =>
    el(
      "li",
      { "data-kind": remark.kind },
      el("div", {}, el("b", {}, remark.kind.replaceAll("_", " ")), " ", el("span", { class: "soft" }, runs.length > 1 ? `${remark.run.name}, ` : "", span(remark))),
      el("div", {}, remark.count === 1 || remark.words === remark.then ? remark.words : `At first: ${remark.words}. At last: ${remark.then}.`),
      el("div", { class: "advice" }, "Try: ", remark.advice),
    ),
  );
  return el("section", { id: "warnings" }, el("h2", {}, "Warnings"), el("ul", {}, items));
}

/** Tables that whoever asked for the page gave it. */
function givenTables() {
  const rows = (given) => given.rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, cell))));
  return report.tables.map((given) => el("section", { class: "given" }, el("h2", {}, given.caption), table(given.heads, rows(given))));
}

/** Every figure of one step, as it stands in metrics.jsonl. */
function figures() {
  const steps = [...new Set(runs.flatMap((run) => run.metrics.step || []))].sort((a, b) => a - b);
  if (!steps.length) return null;
  const slider = el("input", { type: "range", id: "at-step", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "Step" });
  const named = el("output", {});
  const box = el("div");
  const draw = () => {
    const step = steps[slider.value];
    named.textContent = `step ${step}`;
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => name !== "step");
    const value = (run, name) => {
      const at = (run.metrics.step || []).indexOf(step);
      const found = at < 0 ? undefined : run.metrics[name]?.[at];
      return found === null || found === undefined ? "–" : String(found);
    };
    const kept = names.map((name) => [name, ...runs.map((run) => value(run, name))]).filter(([, ...values]) => values.some((v) => v !== "–"));
    box.replaceChildren(table(["metric", ...runs.map((run) => run.name)], kept.map((row) => el("tr", { "data-metric": row[0] }, row.map((cell) => el("td", {}, cell))))));
  };
  slider.addEventListener("input", draw);
  const details = el("details", { id: "figures" }, el("summary", {}, "Every figure of a step"), el("label", { class: "choice" }, slider, named), box);
  details.addEventListener("toggle", () => details.open && draw());
  return details;
}

/** The options, those first in which runs differ. */
function options() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.options)))];
  const differs = (name) => new Set(runs.map((run) => run.options[name])).size > 1;
  const rows = [...names.filter(differs), ...names.filter((name) => !differs(name))].map((name) =>
    el("tr", { class: differs(name) ? "differs" : "" }, [name, ...runs.map((run) => run.options[name] ?? "–")].map((cell) => el("td", {}, cell))),
  );
  const words = runs.length > 1 ? "Options; those in which the runs differ come first" : "Options";
  return el("details", { id: "options" }, el("summary", {}, words), table(["option", ...runs.map((run) => run.name)], rows));
}

/** Machine and versions of each run. */
function about() {
  const flat = (run) => ({ folder: run.folder, ...Object.fromEntries(Object.entries(run.about).flatMap(([k, v]) => (v && typeof v === "object" ? Object.entries(v) : [[k, v]]))) });
  const facts = runs.map(flat);
  const names = [...new Set(facts.flatMap(Object.keys))];
  const rows = names.map((name) => el("tr", {}, [name, ...facts.map((fact) => String(fact[name] ?? "–"))].map((cell) => el("td", {}, cell))));
  return el("details", { id: "about" }, el("summary", {}, "Where and with what"), table(["", ...runs.map((run) => run.name)], rows));
}

const night = matchMedia("(prefers-color-scheme: dark)");
function dress() {
  const own = night.matches ? "dark" : "light";
  document.documentElement.dataset.theme = state.theme === "auto" ? own : state.theme;
}
function themed() {
  dress();
  redraw();
}

/** A button for each run, which shows it or not. */
function chips() {
  const buttons = runs.map((run) => el("button", { class: "chip", "data-run": run.number, onclick: () => toggle(run) }, swatch(colourOf(run)), run.name));
  const toggle = (run) => {
    if (!off.delete(run.number)) off.add(run.number);
    redraw();
  };
  listeners.push(() =>
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(!off.has(i)));
      button.querySelector(".swatch").style.backgroundColor = colourOf(runs[i]);
    }),
  );
  return el("div", { class: "chips" }, buttons);
}

/** The bar that stays in sight: which runs, what curves are drawn against, how smooth, which theme. */
function bar() {
  const parts = [
    runs.length > 1 ? chips() : null,
    choice("against", "x", AXES, redraw),
    choice("smoothing", "smooth", { 0: "none", 0.5: "light", 0.8: "medium", 0.95: "strong" }, redraw),
    choice("theme", "theme", { auto: "auto", light: "light", dark: "dark" }, themed),
  ];
  if (report.stamp) parts.push(choice("follow", "follow", { 1: "live", 0: "paused" }, remember));
  return el("nav", {}, parts.filter(Boolean));
}

/** Loads the page anew when its run has gone on. */
function follow() {
  setInterval(async () => {
    if (state.follow !== "1" || document.hidden) return;
    const answer = await fetch("stamp", { cache: "no-store" }).catch(() => null);
    if (answer?.ok && (await answer.text()) !== report.stamp) location.reload();
  }, 2000);
}

const subtitle = () => {
  if (runs.length !== 1) return `${count(runs.length, "run")}; written ${report.made}`;
  const [run] = runs;
  const plain = (name) => run.options[name]?.replaceAll('"', "");
  return [run.algorithm, plain("model_name_or_path"), plain("dataset_name"), `written ${report.made}`].filter((word) => word && word !== "null").join(" · ");
};

dress();
const body = [overview(), warnings(), ...givenTables(), curvesSection(), runs.length ? detailSection() : null, samplesSection(), figures(), options(), about()];
document.getElementById("page").append(el("header", {}, el("div", {}, el("h1", {}, report.title), el("p", { class: "soft" }, subtitle()))), bar(), ...body.filter(Boolean));
document.body.append(tip);
night.addEventListener("change", themed);
redraw();
if (report.stamp) follow();
