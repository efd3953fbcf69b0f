// Chat: key, conversation, statistics. Key and conversation are kept in this tab only.
import { add, removeFrom, request, restore, save, setUpOptions, turns } from "./conversation.js";
import { count, duration, speed } from "./format.js";
import { ask, chat, ServerError } from "./stream.js";
import { byId, keep, kept, make, say, t } from "./words.js";

const KEY = "shoehorn.key", MODEL = "shoehorn.model";

let key = kept("sessionStorage", KEY);
let models = [], model = "", contextUsed = 0, rate = 0, firstSeconds = 0;
let ready = false, checking = false, running = null;
let editing = null, following = true, lastTop = 0;

const idle = () => ready && key && model && !running;

function showControls() {
  byId("key-form").hidden = Boolean(key && model);
  byId("key-held").hidden = !key || !model;
  byId("composer").hidden = byId("options").hidden = !model;
  byId("log").hidden = !byId("log").children.length;
  byId("clear").hidden = byId("log").hidden;
  byId("again").hidden = !turns.at(-1)?.answered || !idle() || Boolean(editing);
  byId("editing").hidden = !editing;
  byId("ideas").hidden = !idle() || !byId("log").hidden;
  byId("models").hidden = models.length < 2 || !model;
  byId("send").disabled = !idle();
  byId("clear").disabled = Boolean(running);
  byId("stop").hidden = !running;
  byId("log").setAttribute("aria-busy", String(Boolean(running)));
}

export function showFigures() {
  byId("figures").hidden = !contextUsed;
  const contextLimit = models.find(({ id }) => id === model)?.max_model_len ?? 0;
  say("speed", rate ? t("speed", speed(rate)) : "");
  say("first", firstSeconds ? t("first", firstSeconds.toFixed(firstSeconds < 10 ? 2 : 0)) : "");
  say("context", contextLimit ? t("context", count(contextUsed), count(contextLimit))
    : t("context.only", count(contextUsed)));
  const meter = byId("context-meter");
  meter.hidden = !contextLimit;
  meter.max = contextLimit || 1;
  meter.value = contextUsed;
  meter.setAttribute("aria-label", byId("context").textContent);
}

// Formats an error: the server's message if there is one, and the time to retry.
export function explain(error) {
  const own = error.status === -1 ? t("broken") : error.status ? t("status", error.status) : t("unreachable");
  const wait = error.waitSeconds ? ` ${t("wait", duration(error.waitSeconds))}` : "";
  return (error.message || own) + wait;
}

function forget() {
  key = model = "";
  models = [];
  keep("sessionStorage", KEY, "");
  keep("sessionStorage", MODEL, "");
}

// Shows why the server refused the key; the field keeps a wrong one, which may lack a character only.
function refuse(error) {
  say("key-error", error.status === 401 ? `${t("key.wrong")} ${error.message}` : explain(error));
  if (error.status === 401) forget();
}

function choose(id) {
  model = id;
  keep("sessionStorage", MODEL, models.length > 1 ? id : "");
  showFigures();
}

function showModels() {
  byId("model-choice").replaceChildren(...models.map(({ id }) => {
    const option = make("option", "", id);
    option.value = id;
    option.selected = id === model;
    return option;
  }));
}

// Lists the served models, which also checks the key.
async function check(moveFocus) {
  if (!key || checking || !ready) return showControls();
  checking = true;
  say("key-error", "");
  try {
    models = (await (await ask("v1/models", key)).json()).data;
    const before = model || kept("sessionStorage", MODEL);
    choose((models.find(({ id }) => id === before) ?? models[0]).id);
    showModels();
    keep("sessionStorage", KEY, key);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    refuse(error);
  } finally {
    checking = false;
    showControls();
  }
  if (moveFocus) byId(model ? "message" : "key").focus();
}

// The view follows the answer to its end until the reader scrolls up, and again from the end on.
function noteScroll() {
  const log = byId("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 40) following = true;
  else if (log.scrollTop < lastTop) following = false;
  lastTop = log.scrollTop;
}

function showEnd() {
  if (following) byId("log").scrollTop = byId("log").scrollHeight;
}

function measure(usage, clock) {
  contextUsed = usage.total_tokens;
  const now = performance.now();
  clock.first ??= { at: now, tokens: usage.completion_tokens };
  const seconds = (now - clock.first.at) / 1000, tokens = usage.completion_tokens - clock.first.tokens;
  if (seconds > 0 && tokens > 0) rate = tokens / seconds;
  showFigures();
}

async function receive(message, signal) {
  const clock = {}, asked = performance.now();
  for await (const { reasoning, content, usage, finish } of chat({ model, ...request() }, key, signal)) {
    if (reasoning || content) {
      if (!message.reasoning && !message.content) firstSeconds = (performance.now() - asked) / 1000;
      message.add(reasoning, content);
    }
    if (usage?.completion_tokens && (content || reasoning || !clock.first)) measure(usage, clock);
    else if (usage) { contextUsed = usage.total_tokens; showFigures(); }
    if (finish === "length") message.note("cut", "", "note");
  }
}

async function send(text) {
  if (editing) removeFrom(editing);
  editing = null;
  byId("log").hidden = false;
  const turn = add(text, edit), message = turn.answer;
  running = new AbortController();
  rate = firstSeconds = 0;
  following = true;
  showEnd();
  message.onDraw = showEnd;
  say("activity", t("answering"));
  showControls();
  byId("composer").scrollIntoView({ block: "nearest" });
  let ending = "answered";
  try {
    await receive(message, running.signal);
  } catch (error) {
    if (running.signal.aborted) {
      ending = "stopped";
      message.note("stopped", "", "note");
    } else if (error instanceof ServerError) {
      ending = "";
      message.note("", explain(error), "error");
      if (error.status === 401) refuse(error);
    } else throw error;
  } finally {
    message.end();
    showEnd();
    running = null;
    turn.answered = Boolean(message.content);
    if (!turn.answered && !byId("message").value) byId("message").value = text; // to be sent again
    save();
    say("activity", ending ? t(ending) : "");
    showControls();
  }
}

// Puts a question into the field; sending replaces it and all that follows.
function edit(turn) {
  if (running) return;
  editing = turn;
  byId("message").value = turn.question.content;
  showControls();
  byId("message").focus();
}

// Called with each state: readiness of the engine, and the name of its model.
export function setReady(now) {
  const before = ready;
  ready = now;
  if (ready && !before) check(false);
  else showControls();
}

export function setUp() {
  byId("key").value = key;
  byId("key").addEventListener("input", () => { byId("key").value = byId("key").value.trim(); });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = byId("key").value;
    check(true);
  });
  byId("forget").addEventListener("click", () => {
    running?.abort();
    forget();
    byId("key").value = "";
    showControls();
    byId("key").focus();
  });
  byId("clear").addEventListener("click", () => {
    editing = null;
    contextUsed = 0;
    if (turns.length) removeFrom(turns[0]);
    byId("log").replaceChildren();
    showFigures();
    showControls();
    byId("message").focus();
  });
  byId("again").addEventListener("click", () => { // resend the question and replace its answer
    const turn = turns.at(-1), text = turn.question.content;
    removeFrom(turn);
    send(text);
  });
  byId("edit-cancel").addEventListener("click", () => {
    editing = null;
    byId("message").value = "";
    showControls();
    byId("message").focus();
  });
  byId("log").addEventListener("scroll", noteScroll);
  byId("model-choice").addEventListener("change", (event) => choose(event.target.value));
  for (const button of document.querySelectorAll("#ideas button")) button.addEventListener("click", () => {
    if (idle()) send(button.textContent);
    byId("message").focus();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("message").value.trim();
    if (!text || !idle()) return;
    byId("message").value = "";
    send(text);
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // during composition Enter selects a character
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("stop").addEventListener("click", () => {
    running?.abort();
    byId("message").focus();
  });
  addEventListener("pagehide", save); // also of an answer that is not complete
  setUpOptions();
  restore(edit);
  showControls();
  showEnd();
}
