// Console page: status of the appliance and, once ready, chat and example calls. The status needs no key.
import * as chat from "./chat.js";
import * as snippets from "./snippets.js";
import { follow, phaseName, showStatus } from "./status.js";
import { showPlan } from "./vram.js";
import { byId, locale, say, switchLanguage, t, translate } from "./words.js";

let state = null, now = 0;
let used = false, away = false, connected = true, backUntil = 0;
const BACK_MS = 10000;

function showNotice() {
  const missing = away || (used && !connected);
  if (missing) backUntil = Infinity;
  else if (backUntil === Infinity) backUntil = Date.now() + BACK_MS;
  const back = used && !missing && state.phase === "ready" && Date.now() < backUntil;
  say("notice", !connected ? t("lost") : state?.phase === "idle" ? t("idle") : away ? t("again", phaseName(state.phase)) : back ? t("back") : "");
}

function show() {
  if (!state) return;
  const ready = state.phase === "ready" || state.phase === "idle"; // a message starts an idle engine
  away = used && !ready && state.phase !== "failed";
  used ||= ready;
  showStatus(state, now, used);
  showPlan(state, locale());
  snippets.showSnippets(state.model, state.plan?.task);
  chat.setReady(ready && connected);
}

function speak() {
  document.documentElement.lang = locale();
  byId("language").textContent = t("other");
  byId("language").lang = t("other.lang");
  translate(document);
}

byId("language").addEventListener("click", () => {
  switchLanguage();
  speak();
  show();
  showNotice();
  chat.showFigures();
});
chat.setUp();
snippets.setUp();
speak();
follow((answer, clock) => {
  [state, now, connected] = [answer, clock, true];
  show();
  showNotice();
}, () => {
  connected = false;
  chat.setReady(false);
  showNotice();
});
