// The peak as an interactive bar. The numbers come from the server; until plotly.js has loaded, and
// where it cannot load, the server's own drawing stays.

const HATCHES = {
  gradients: "/",
  optimizer_states: "x",
  activations: "\\",
  buffers: ".",
  workspace: "-",
  runtime: "|",
  outside: "+",
};

let loading = null;
// One drawing for the life of the page: plotly.js updates it faster than it makes a new one.
const drawing = document.createElement("div");
drawing.className = "plot";

function load(path) {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = path;
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => reject(new Error("plotly.js did not load")));
    document.head.append(script);
  });
  return loading;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** plotly.js reads labels as a kind of HTML. */
function plain(text) {
  return text.replace(/[<>&]/g, " ");
}

function traces(data) {
  return data.bars.flatMap((bar) =>
    bar.segments.map((segment) => ({
      type: "bar",
      orientation: "h",
      x: [segment.bytes],
      y: [plain(bar.label)],
      name: plain(segment.label),
      hovertemplate: `${plain(segment.label)}: ${plain(segment.text)}<extra></extra>`,
      marker: {
        color: colour(segment.component),
        line: { color: colour("page"), width: 1 },
        pattern: {
          shape: HATCHES[segment.component] ?? "",
          fillmode: "overlay",
          fgcolor: colour("page"),
          fgopacity: 0.5,
          solidity: 0.12,
        },
      },
    })),
  );
}

function line(x, name, dash) {
  return {
    type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1,
    line: { color: colour(name), width: dash ? 3 : 2, dash: dash ?? "solid" },
  };
}

function layout(data) {
  const shapes = [];
  if (data.low && data.high) {
    const [low, high] = [data.low.bytes, data.high.bytes];
    shapes.push({ ...line(low, "range"), x1: high, y0: 0.5, y1: 0.5 });
    for (const x of [low, high]) shapes.push({ ...line(x, "range"), y0: 0.4, y1: 0.6 });
  }
  if (data.capacity) shapes.push(line(data.capacity.bytes, "capacity", "dash"));
  return {
    barmode: "stack",
    height: 130,
    margin: { l: 4, r: 4, t: 8, b: 30 },
    showlegend: false,
    shapes,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("text"), size: 12 },
    xaxis: {
      range: [0, data.scale],
      tickvals: data.ticks.map((tick) => tick.bytes),
      ticktext: data.ticks.map((tick) => tick.label),
      gridcolor: colour("line"),
      fixedrange: true,
      automargin: false,
    },
    yaxis: { visible: false, fixedrange: true },
  };
}

/** Draws the figure's numbers over the server's drawing; does nothing without a figure. */
export async function draw(figure, path) {
  if (!figure) return;
  const data = JSON.parse(figure.querySelector("script").textContent);
  let plotly;
  try {
    plotly = await load(path);
  } catch {
    return;
  }
  const place = figure.querySelector(".drawing");
  if (!place.isConnected) return;
  place.replaceChildren(drawing);
  // No toolbar: one of its buttons offers to upload the chart to a service.
  await plotly.react(drawing, traces(data), layout(data), {
    displayModeBar: false,
    responsive: true,
  });
}
