// Curves: a card for each metric, all runs in it, by uPlot.

/** The nearest of ascending numbers. */
function nearest(values, at) {
  let low = 0;
  let high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < at) low = middle;
    else high = middle;
  }
  return Math.abs(values[high] - at) < Math.abs(values[low] - at) ? high : low;
}

/** A moving average that forgets; `weight` of the past. */
function smoothed(values, weight) {
  let sum = 0;
  let mass = 0;
  return values.map((value) => {
    sum = sum * weight + value;
    mass = mass * weight + 1;
    return sum / mass;
  });
}

const AXIS_FONT = "11px system-ui, sans-serif";
function axes(compact) {
  const common = { stroke: style("--soft"), font: AXIS_FONT, ticks: { show: false }, grid: { stroke: style("--line"), width: 1 } };
  return [
    { ...common, size: 26, space: 60, values: (_, ticks) => ticks.map((v) => (v === null ? "" : compact(v))) },
    {
      ...common,
      size: 52,
      space: 34,
      grid: { ...common.grid, filter: (plot, ticks) => (plot.scales.y.distr === 3 ? ticks.map((v) => (Number.isInteger(Math.log10(v)) ? v : null)) : ticks) },
      values: (_, ticks) => ticks.map((v) => (v === null ? "" : compact(v))),
    },
  ];
}

/** The span of the y axis: something, if all values are the same. */
function span(_, low, high) {
  if (low === null) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
  return uPlot.rangeNum(low, high, 0.1, true);
}

/** The drawing of a card: a line for each visible run and metric. */
function lines(metrics) {
  return shownRuns().flatMap((run) =>
    metrics.map((metric, i) => ({ run, metric, second: i > 0, ...points(run, metric, state.x) })).filter((line) => line.x.length),
  );
}

/** A chart that fills its box, is drawn once it comes into sight and whenever it changed, and says what is under the pointer. */
function chart(box, height, build, hover) {
  let plot = null;
  let stale = true;
  let seen = false;
  const draw = () => {
    stale = false;
    hush();
    plot?.destroy();
    const made = build();
    box.classList.toggle("empty", made === null);
    plot = made && new uPlot({ width: box.clientWidth || 300, height, legend: { show: false }, ...made.options }, made.data, box);
    if (!plot) return;
    plot.over.addEventListener("mousemove", (event) => {
      const { left } = plot.over.getBoundingClientRect();
      const said = hover(plot.posToVal(event.clientX - left, "x"), made);
      if (said) say(event, ...said);
    });
    plot.over.addEventListener("mouseleave", hush);
  };
  new ResizeObserver(() => {
    if (plot && box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height });
  }).observe(box);
  const watch = new IntersectionObserver(
    (entries) => {
      seen = entries.at(-1).isIntersecting;
      if (seen && stale) draw();
    },
    { rootMargin: "200px" },
  );
  watch.observe(box);
  listeners.push(() => {
    stale = true;
    if (seen) draw();
  });
}

/** Curves of some metrics against the chosen axis. */
function curves(metrics, logarithmic) {
  const drawn = lines(metrics);
  if (!drawn.length) return null;
  const smooth = Number(state.smooth);
  const series = [{}];
  const tables = [];
  for (const line of drawn) {
    const stroke = colourOf(line.run);
    const dash = line.second ? [2, 3] : line.run.dash;
    series.push({ stroke: smooth ? `${stroke}40` : stroke, width: smooth ? 1 : 1.6, dash, spanGaps: true, points: { size: 4, fill: stroke } });
    tables.push([line.x, line.y]);
    if (smooth) {
      series.push({ stroke, width: 1.8, dash, spanGaps: true, points: { show: false } });
      tables.push([line.x, smoothed(line.y, smooth)]);
    }
  }
  const log = logarithmic && drawn.every((line) => line.y.every((v) => v > 0));
  const options = {
    series,
    axes: axes(brief),
    scales: { x: { time: false }, y: log ? { distr: 3 } : { range: span } },
    cursor: { y: false, drag: { x: true, y: false }, points: { show: false }, sync: { key: "curves", scales: ["x", null] } },
  };
  return { options, data: uPlot.join(tables), drawn };
}

/** The runs' figures nearest to an x, each as it was logged. */
function nearby(at, { drawn }) {
  const rows = drawn.map((line) => {
    const i = nearest(line.x, at);
    const words = [runs.length > 1 ? line.run.name : null, line.second ? line.metric.split("/").pop() : null].filter(Boolean);
    const where = `step ${line.step[i]}`;
    return el("tr", {}, el("td", {}, swatch(colourOf(line.run)), words.join(" ")), el("td", {}, where), el("td", { class: "value" }, String(line.y[i])));
  });
  return [el("table", {}, rows)];
}

/** A card's curves, in a line of text. */
function gist(metric) {
  const ends = shownRuns().map((run) => points(run, metric, "step").y).filter((y) => y.length);
  if (!ends.length) return [];
  if (ends.length === 1) return ends[0].length > 1 ? [figure(ends[0][0]), " → ", figure(ends[0].at(-1))] : [figure(ends[0][0])];
  const last = ends.map((y) => y.at(-1));
  return [figure(Math.min(...last)), " to ", figure(Math.max(...last)), " at the end"];
}

/** A card with one metric's curves. */
function card(metric, title = WORDS[metric] || metric) {
  const metrics = [metric, ...(BESIDE[metric] ? [BESIDE[metric]] : [])];
  const box = el("div", { class: "plot" });
  const said = el("span", { class: "gist" });
  const words = metrics.length > 1 ? `${metric}; dashed: ${metrics[1].split("/").pop()}` : metric;
  const name = el("code", { title: words }, words);
  const node = el("figure", { class: "card", "data-metric": metric }, el("figcaption", {}, el("b", {}, title), el("div", {}, said, name)), box);
  chart(box, 168, () => curves(metrics, LOGARITHMIC.has(metric)), nearby);
  listeners.push(() => said.replaceChildren(...gist(metric)));
  return node;
}

/** All curves: those with words, and one for any metric. */
function curvesSection() {
  const known = Object.keys(WORDS).filter((metric) => allMetrics.includes(metric));
  const others = allMetrics.filter((metric) => !known.includes(metric));
  const free = el("div", { class: "plot" });
  const pick = choice("Any metric", "metric", Object.fromEntries([...others, ...known].map((m) => [m, m])), redraw);
  const said = el("span", { class: "gist" });
  chart(free, 168, () => curves([state.metric], false), nearby);
  listeners.push(() => said.replaceChildren(...gist(state.metric)));
  const any = el("figure", { class: "card", id: "any" }, el("figcaption", {}, pick, el("div", {}, said)), free);
  return el("section", { id: "curves" }, el("h2", {}, "Curves"), el("div", { class: "cards" }, known.map((m) => card(m)), allMetrics.length ? any : null));
}
