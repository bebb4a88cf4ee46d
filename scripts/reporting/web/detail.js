// One run in detail: where its time goes, and how rewards and lengths are spread at each step.

const phaseMark = (name) => swatch(style(`--phase-${name}`));
const detailed = () => runs[Number(state.detail)] || runs[0];

/** Seconds of each phase, stacked, with what is left of the step on top. */
function phases() {
  const { metrics } = detailed();
  const rows = (metrics["time/step"] || []).map((seconds, i) => [seconds, i]).filter(([seconds]) => typeof seconds === "number");
  if (!rows.length) return null;
  const names = report.phases.filter((phase) => metrics[`time/${phase}`]);
  const sums = rows.map(() => 0);
  const layers = names.map((name) => rows.map(([, i], at) => (sums[at] += metrics[`time/${name}`][i] || 0)));
  layers.push(rows.map(([seconds], at) => Math.max(seconds, sums[at])));
  const colours = [...names, "rest"].map((name) => style(`--phase-${name}`));
  const series = [{}, ...layers.map((_, i) => ({ stroke: colours[i], fill: colours[i], width: 0, points: { show: false } })).reverse()];
  const options = {
    series,
    axes: axes(brief),
    scales: { x: { time: false }, y: { range: (_, low, high) => [0, high * 1.05 || 1] } },
    cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
  };
  return { options, data: [rows.map(([, i]) => metrics.step[i]), ...layers.reverse()], rows, names };
}

/** A step's phases as they were logged. */
function phasesAt(at, { rows, names }) {
  const { metrics } = detailed();
  const [seconds, i] = rows[nearest(rows.map(([, row]) => metrics.step[row]), at)];
  const line = (name, value) => el("tr", {}, el("td", {}, name === "step" ? null : phaseMark(name), name), el("td", { class: "value" }, String(value)));
  const parts = names.map((name) => line(name, metrics[`time/${name}`][i] ?? 0));
  return [el("b", {}, `step ${metrics.step[i]}, seconds`), el("table", {}, parts, line("step", seconds))];
}

/** Where all of a run's seconds went. */
function share() {
  const { metrics } = detailed();
  const sum = (name) => (metrics[name] || []).reduce((total, value) => total + (value || 0), 0);
  const all = sum("time/step");
  const parts = report.phases.map((name) => [name, sum(`time/${name}`)]);
  const rest = Math.max(0, all - parts.reduce((total, [, seconds]) => total + seconds, 0));
  const keys = [...parts, ["rest", rest]].filter(([, seconds]) => seconds > 0);
  return keys.map(([name, seconds]) => el("span", { class: "key" }, phaseMark(name), `${name} ${all ? Math.round((100 * seconds) / all) : 0}%`));
}

/** Tokens a second from the beginning of a rollout to its end: those of the last step, and the mean of all. */
function pace() {
  const { metrics } = detailed();
  const rows = (metrics["throughput/pace"] || []).filter(Array.isArray);
  if (!rows.length) return null;
  const x = rows[0].map((_, i) => (100 * (i + 0.5)) / rows[0].length);
  const mean = x.map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  const stroke = colourOf(detailed());
  const series = [{}, { stroke, width: 1.8, points: { show: false } }, { stroke, width: 1, dash: [2, 3], points: { show: false } }];
  const options = {
    series,
    axes: axes(brief),
    scales: { x: { time: false, range: [0, 100] }, y: { range: (_, low, high) => [0, high * 1.05 || 1] } },
    cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
  };
  return { options, data: [x, rows.at(-1), mean] };
}

/** The pace at a place of the rollout. */
function paceAt(at, { data: [x, newest, mean] }) {
  const i = nearest(x, at);
  const line = (name, value) => el("tr", {}, el("td", {}, name), el("td", { class: "value" }, brief(value)));
  return [el("b", {}, `after ${Math.round(x[i])}% of the time, tokens/s`), el("table", {}, line("last step", newest[i]), line("mean of all", mean[i]))];
}

/** A map of counts: a column a step, a row a value or bin, darker where more samples lie. */
function heat(box, kind) {
  const canvas = el("canvas", { height: 150 });
  const low = el("span");
  const high = el("span");
  const first = el("span");
  const last = el("span");
  box.append(el("div", { class: "heat" }, el("div", { class: "scale" }, high, low), canvas), el("div", { class: "under" }, first, last));
  const table = () => samplesOf(detailed().number)?.spread[kind];
  const bins = (spread) => spread.marks.length - (spread.edges ? 1 : 0);
  const draw = () => {
    const spread = table();
    box.classList.toggle("empty", !spread?.steps.length);
    if (!spread?.steps.length) return;
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.round(150 * ratio);
    const pen = canvas.getContext("2d");
    const rows = bins(spread);
    const wide = canvas.width / spread.steps.length;
    const down = (row) => Math.round(canvas.height * (1 - row / rows));
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = style("--heat");
    spread.counts.forEach((counts, column) => {
      const all = counts.reduce((a, b) => a + b, 0);
      counts.forEach((n, row) => {
        if (!n) return;
        pen.globalAlpha = 0.08 + 0.92 * Math.sqrt(n / all);
        const left = Math.round(column * wide);
        pen.fillRect(left, down(row + 1), Math.max(1, Math.round((column + 1) * wide) - left), down(row) - down(row + 1));
      });
    });
    low.textContent = brief(spread.marks[0]);
    high.textContent = brief(spread.marks.at(-1));
    first.textContent = `step ${spread.steps[0]}`;
    last.textContent = `step ${spread.steps.at(-1)}`;
  };
  canvas.addEventListener("mousemove", (event) => {
    const spread = table();
    if (!spread?.steps.length) return;
    const area = canvas.getBoundingClientRect();
    const column = Math.min(spread.steps.length - 1, Math.floor(((event.clientX - area.left) / area.width) * spread.steps.length));
    const row = Math.max(0, Math.ceil((1 - (event.clientY - area.top) / area.height) * bins(spread)) - 1);
    const counts = spread.counts[Math.max(0, column)];
    const all = counts.reduce((a, b) => a + b, 0);
    const { marks } = spread;
    const range = spread.edges ? `from ${brief(marks[row])} to below ${brief(marks[row + 1])}` : String(marks[row]);
    const said = `${counts[row]} of ${all} samples (${Math.round((100 * counts[row]) / all)}%)`;
    say(event, el("b", {}, `step ${spread.steps[column]}`), el("div", {}, `${kind} ${range}: ${said}`));
  });
  canvas.addEventListener("mouseleave", hush);
  new ResizeObserver(draw).observe(canvas);
  listeners.push(draw);
}

function detailSection() {
  const timeBox = el("div", { class: "plot" });
  const keys = el("div", { class: "keys" });
  chart(timeBox, 176, phases, phasesAt);
  listeners.push(() => keys.replaceChildren(...share()));
  const paced = runs.some((run) => run.metrics["throughput/pace"]);
  const paceBox = el("div", { class: "plot" });
  if (paced) chart(paceBox, 176, pace, paceAt);
  const rewardBox = el("div", { class: "plot" });
  const lengthBox = el("div", { class: "plot" });
  heat(rewardBox, "reward");
  heat(lengthBox, "length");
  const frame = (id, title, words, box, more = null) =>
    el("figure", { class: "card", id }, el("figcaption", {}, el("b", {}, title), el("div", {}, more, words ? el("span", { class: "soft" }, words) : null)), box);
  const pick = runs.length > 1 ? choice("Run", "detail", Object.fromEntries(runs.map((run) => [run.number, run.name])), redraw) : null;
  return el(
    "section",
    { id: "detail" },
    el("h2", {}, runs.length > 1 ? "One run in detail" : "Time, rewards and lengths", pick),
    el(
      "div",
      { class: "cards wide" },
      frame("phases", "Seconds of a step, by phase", "", timeBox, keys),
      paced ? frame("pace", "Tokens a second within a rollout, by % of its time", "dashed: the mean of all steps", paceBox) : null,
      frame("rewards", "Rewards by step", "the stronger the colour, the more of a step's samples", rewardBox),
      frame("lengths", "Lengths by step, tokens", "the stronger the colour, the more of a step's samples", lengthBox),
    ),
  );
}
