// The plan, and a chart of each GPU's memory: parts as the plan expects them and as the engine measured them.
import { count, size, speed } from "./format.js";
import { byId, make, t } from "./words.js";

const HELD = ["weights", "quant_state", "embeddings", "offload_buffer"]; // the engine usually measures these as one
const REST = ["kv_cache", "cuda_graphs", "framework"];
const RESERVE = "activations";
const QUANTIZATION = { "": "as-is", bitsandbytes: "nf4", int4: "int4" };

// "12.3 s: import 4.9 s, read 3.1 s, ..." of the last start, the longest parts first; empty before it.
function start(seconds) {
  const parts = Object.entries(seconds).filter(([part, value]) => part !== "total" && value >= 0.1)
    .sort(([, one], [, other]) => other - one).map(([part, value]) => t(`start.${part}`, value.toFixed(1)));
  return "total" in seconds ? t("start.total", seconds.total.toFixed(1), parts.join(", ")) : "";
}

function facts(plan, seconds) {
  const expected = plan.expected_tokens_per_second ?? {};
  const speeds = [["batch_1", "speed.one"], ["batch_8", "speed.eight"]]
    .filter(([batch]) => expected[batch]).map(([batch, words]) => t(words, speed(expected[batch])));
  return [
    ["plan.weights", QUANTIZATION[plan.quantization] ? t(QUANTIZATION[plan.quantization]) : plan.quantization],
    ["plan.disk", size(plan.disk_bytes)],
    ["plan.context", t("tokens", count(plan.max_model_len))],
    ["plan.requests", count(plan.max_num_seqs)],
    ["plan.kv", plan.kv_cache_tokens ? t("tokens", count(plan.kv_cache_tokens)) : ""],
    ["plan.host", size(plan.host_bytes)],
    ["plan.offloaded", plan.offloaded_bytes ? size(plan.offloaded_bytes) : ""],
    ["plan.speed", speeds.join(", ")],
    ["plan.start", start(seconds)],
  ].filter(([, value]) => value);
}

// One bar: parts [name, bytes], drawn to a scale of `whole` bytes, with a text alternative.
function bar(title, parts, whole) {
  const row = make("div", "vram-row");
  row.append(make("span", "vram-label", title));
  const stack = make("div", "stack");
  stack.setAttribute("role", "img");
  const shown = parts.filter(([, bytes]) => bytes > 0);
  stack.setAttribute("aria-label", t("picture", title,
    shown.map(([part, bytes]) => `${t(`part.${part}`)} ${size(bytes)}`).join(", ")));
  let drawn = 0;
  for (const [part, bytes] of shown) {
    const piece = make("span");
    piece.dataset.part = part;
    piece.style.width = `${(100 * bytes) / whole}%`;
    piece.title = `${t(`part.${part}`)}: ${size(bytes)}`;
    drawn += bytes;
    stack.append(piece);
  }
  stack.dataset.bytes = String(drawn);
  row.append(stack);
  return row;
}

function line(part, expected, measured) {
  const row = make("tr"), head = make("th");
  head.scope = "row";
  if (part in { total: 0 }) head.textContent = t("total");
  else {
    const swatch = make("span", "swatch");
    swatch.dataset.part = part;
    head.append(swatch, t(`part.${part}`));
  }
  row.append(head, make("td", "", expected));
  if (measured !== null) row.append(measured);
  return row;
}

function table(parts, measured) {
  const made = make("table"), head = make("tr"), body = make("tbody");
  for (const column of ["part", "expected", ...(measured ? ["measured"] : [])]) {
    const cell = make("th", "", t(column));
    cell.scope = "col";
    head.append(cell);
  }
  const cell = (bytes) => make("td", "", bytes === null || bytes === undefined ? t("unknown") : size(bytes));
  const apart = measured && "quant_state" in measured ? ["quant_state"] : [];
  const held = HELD.filter((part) => parts[`${part}_bytes`] > 0 && !apart.includes(part));
  held.forEach((part, place) => {
    let value = null;
    if (measured && place === 0) {
      value = cell(measured.weights);
      value.rowSpan = held.length;
    }
    body.append(line(part, size(parts[`${part}_bytes`]), value));
  });
  for (const part of [...apart, ...REST]) body.append(line(part, size(parts[`${part}_bytes`]), measured ? cell(measured[part]) : null));
  body.append(line(RESERVE, size(parts.activations_bytes), measured ? make("td", "note", t("reserve")) : null));
  body.append(line("total", t("of", size(parts.total_bytes), size(parts.limit_bytes)),
    measured ? cell(measured.total) : null));
  const header = make("thead");
  header.append(head);
  made.append(header, body);
  return made;
}

function legend(vram) {
  const shown = [...HELD, ...REST, RESERVE].filter((part) => vram.some((parts) => parts[`${part}_bytes`] > 0));
  return shown.map((part) => {
    const entry = make("li"), swatch = make("span", "swatch");
    swatch.dataset.part = part;
    entry.append(swatch, t(`part.${part}`));
    return entry;
  });
}

// `open`: its details are expanded.
function chart(parts, number, rows, open) {
  const section = make("section", "gpu");
  section.append(make("h3", "", t("gpu", number)));
  const measured = rows.length ? Object.fromEntries(rows.map((row) => [row.part, row.measured_bytes])) : null;
  const whole = Math.max(parts.limit_bytes, parts.total_bytes, measured?.total ?? 0);
  const expected = [...HELD, ...REST, RESERVE].map((part) => [part, parts[`${part}_bytes`]]);
  section.append(bar(t("expected"), [...expected, ["free", parts.limit_bytes - parts.total_bytes]], whole));
  if (measured) {
    const known = ["weights", "quant_state", ...REST].map((part) => [part, measured[part] ?? 0]);
    section.append(bar(t("measured"), known, whole));
  }
  const figures = make("details", "figures"), summary = make("summary", "", t("figures"));
  summary.setAttribute("aria-label", t("figures.of", number));
  figures.open = open;
  figures.append(summary, table(parts, measured));
  section.append(figures);
  return section;
}

let shown = "";

// Redrawn only after a change, so that selections and screen readers are not disturbed.
export function showPlan(state, language) {
  const plan = state.plan ?? {};
  const present = JSON.stringify([plan, state.memory, state.start_seconds, language]);
  if (present === shown) return;
  shown = present;
  byId("plan").hidden = !("vram" in plan);
  if (byId("plan").hidden) return;
  byId("plan-facts").replaceChildren(...facts(plan, state.start_seconds ?? {}).map(([key, value]) => {
    const pair = make("div");
    pair.append(make("dt", "", t(key)), make("dd", "", value));
    return pair;
  }));
  const charts = plan.vram.map((parts, number) =>  // numbered as by nvidia-smi
    chart(parts, plan.gpus?.[number]?.index ?? number, (state.memory ?? []).filter((row) => row.gpu === number), plan.vram.length === 1));
  byId("legend").replaceChildren(...legend(plan.vram));
  byId("vram").replaceChildren(...(charts.length ? charts : [make("p", "note", t("cpu"))]));
}
