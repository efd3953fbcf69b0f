// Shows /status: phase, progress, failure. Polled every two seconds.
import { duration, size } from "./format.js";
import { byId, detail, make, say, t, TEXT } from "./words.js";

const STEP_OF = {
  starting: "prepare", pulling: "fetch", verifying: "fetch", converting: "fetch",
  loading: "load", stepping_down: "load", waiting: "load", ready: "ready", idle: "ready",
};
const ORDER = ["prepare", "fetch", "load", "ready"];
const PERIOD_MS = 2000;
const PATIENCE_MS = 5000;

function showSteps({ phase, bytes_total }) {
  // Without a download there is no such step: the model was complete, or is a local folder.
  const fetched = bytes_total > 0 || !["load", "ready"].includes(STEP_OF[phase]);
  document.querySelector('[data-step="fetch"]').hidden = !fetched;
  const current = ORDER.indexOf(STEP_OF[phase]);
  for (const item of document.querySelectorAll("#steps li")) {
    const place = ORDER.indexOf(item.dataset.step);
    item.dataset.state = place < current || phase === "ready" ? "done" : place === current ? "now" : "later";
    if (place === current) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
  }
}

// The text of a key if it exists: a newer server may have a phase that this page does not know.
const known = (key) => (key in TEXT.en ? t(key) : "");

export const phaseName = (phase) => known(`phase.${phase}`) || phase;

function showProgress(state, now) {
  say("headline", known(`headline.${state.phase}`));
  const bar = byId("progress");
  if (state.progress === null) bar.removeAttribute("value");
  else bar.value = state.progress;
  say("detail", detail(state.detail));
  const fetching = STEP_OF[state.phase] === "fetch" && state.bytes_total > 0;
  const rate = fetching ? state.rate_bytes_per_second ?? 0 : 0;
  say("amount", fetching ? `${size(state.bytes_done)} / ${size(state.bytes_total)}` : "");
  say("percent", state.progress === null ? "" : `${Math.floor(state.progress * 100)} %`);
  say("rate", rate > 0 ? `${size(rate)}/s` : "");
  say("left", rate > 0 ? t("left", duration(Math.ceil((state.bytes_total - state.bytes_done) / rate))) : "");
  say("elapsed", state.since > 0 ? t("elapsed", duration(Math.max(0, now - state.since))) : "");
}

// The replicas of a front, each with its state and the reason of the check.
function showReplicas(replicas) {
  byId("machines").hidden = !replicas.length;
  byId("machine-list").replaceChildren(...replicas.map(({ name, state, reason }) => {
    const item = make("li", "", `${name}: ${known(`replica.${state}`) || state}`);
    item.dataset.state = state;
    item.title = reason;
    return item;
  }));
}

// `now`: the server's clock, in seconds. `used`: it was ready before, so the conversation stays visible.
export function showStatus(state, now, used) {
  const { phase } = state;
  const ready = phase === "ready" || phase === "idle", failed = phase === "failed";
  say("badge", phaseName(phase));
  byId("badge").dataset.kind = phase === "ready" || failed ? phase : "waiting";
  document.title = `${phaseName(phase)} · Shoehorn`;
  say("model", state.model);
  byId("start").hidden = ready || failed;
  byId("failure").hidden = !failed;
  const task = state.plan?.task ?? "generate"; // a plan of an earlier version names none: it serves text
  byId("use").hidden = !used;
  byId("chat").hidden = !used || task !== "generate";
  say("serves", task === "generate" ? "" : known(`serves.${task}`));
  showSteps(state);
  showProgress(state, now);
  showReplicas(state.replicas ?? []);
  say("cause", state.cause);
  say("remedy", state.remedy);
  byId("remedy-title").hidden = !state.remedy;
}

// Calls `seen(state, now)` for each answer, and `lost()` without one.
export async function follow(seen, lost) {
  for (;;) {
    let state = null, clock = 0;
    try {
      const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (answer.ok) {
        state = await answer.json();
        clock = Date.parse(answer.headers.get("Date")) || Date.now(); // the server's clock: this machine's may be wrong
      }
    } catch (error) { // no network, timeout, or incomplete document
      if (!(error instanceof TypeError || error instanceof DOMException || error instanceof SyntaxError)) throw error;
    }
    if (state) seen(state, clock / 1000);
    else lost();
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  }
}
