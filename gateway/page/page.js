// Shows /status, asked every two seconds, and how to call the server once it is ready. English or Chinese.
"use strict";

const TEXT = {
  en: {
    phase: {
      starting: "Starting", pulling: "Downloading", verifying: "Checking files", converting: "Converting",
      loading: "Loading", ready: "Ready", stepping_down: "Trying a smaller plan", failed: "Failed", stopping: "Stopping",
    },
    headline: {
      starting: "Looking at the machine and planning", pulling: "Downloading the model",
      verifying: "Checking every file", converting: "Converting the weights", loading: "Loading the model",
      stepping_down: "That did not fit; trying a smaller plan", stopping: "Stopping",
    },
    steps: { prepare: "Plan", fetch: "Download", load: "Load", ready: "Ready" },
    failure: "The model cannot be served", remedy: "What to do",
    use: "Call it", copy: "Copy", copied: "Copied", prompt: "What is your name?",
    key: "Put your key in the place of YOUR_KEY. Lost it? Inside the container, this makes a new one:",
    lost: "No connection to the server; trying again.",
    elapsed: (text) => `for ${text}`, units: ["s", "min", "h"],
  },
  zh: {
    phase: {
      starting: "启动中", pulling: "下载中", verifying: "校验中", converting: "转换中", loading: "加载中",
      ready: "就绪", stepping_down: "缩减方案中", failed: "失败", stopping: "停止中",
    },
    headline: {
      starting: "正在检查机器并制定方案", pulling: "正在下载模型", verifying: "正在校验每个文件",
      converting: "正在转换权重", loading: "正在加载模型", stepping_down: "显存不足，正在尝试更小的方案",
      stopping: "正在停止",
    },
    steps: { prepare: "规划", fetch: "下载", load: "加载", ready: "就绪" },
    failure: "模型无法提供服务", remedy: "解决办法",
    use: "调用方法", copy: "复制", copied: "已复制", prompt: "你叫啥?",
    key: "请把 YOUR_KEY 换成您的密钥。忘记密钥时，可在容器内用此命令生成新的密钥：",
    lost: "无法连接服务器，正在重试。",
    elapsed: (text) => `已用 ${text}`, units: ["秒", "分", "小时"],
  },
};
const STEP_OF = {
  starting: "prepare", pulling: "fetch", verifying: "fetch", converting: "fetch",
  loading: "load", stepping_down: "load", ready: "ready",
};
const ORDER = ["prepare", "fetch", "load", "ready"];

const chinese = (navigator.language || "").toLowerCase().startsWith("zh");
const words = chinese ? TEXT.zh : TEXT.en;
const byId = (id) => document.getElementById(id);

function say(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text; // unchanged text is not read out again
}

function size(bytes) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (bytes >= unit) return `${(bytes / unit).toFixed(unit === 2 ** 30 ? 2 : 0)} ${name}`;
  return `${bytes} B`;
}

function duration(seconds) {
  const [s, min, h] = words.units;
  if (seconds < 60) return `${Math.floor(seconds)} ${s}`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} ${min}`;
  return `${Math.floor(seconds / 3600)} ${h} ${Math.floor((seconds % 3600) / 60)} ${min}`;
}

function curl(model) {
  const quoted = (value) => JSON.stringify(value).replaceAll("'", "'\\''");
  return [
    `curl -N ${location.origin}/v1/chat/completions \\`,
    `  -H "Authorization: Bearer YOUR_KEY" \\`,
    `  -H "Content-Type: application/json" \\`,
    `  -d '{`,
    `    "model": ${quoted(model)},`,
    `    "stream": true,`,
    `    "messages": [{"role": "user", "content": ${quoted(words.prompt)}}]`,
    `  }'`,
  ].join("\n");
}

function showSteps(phase) {
  const current = ORDER.indexOf(STEP_OF[phase]);
  for (const item of document.querySelectorAll("#steps li")) {
    const place = ORDER.indexOf(item.dataset.step);
    item.dataset.state = place < current || phase === "ready" ? "done" : place === current ? "now" : "later";
    if (place === current) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
  }
}

function show(state, now) {
  const { phase } = state;
  const ready = phase === "ready", failed = phase === "failed";
  say("badge", words.phase[phase] ?? phase);
  byId("badge").dataset.kind = ready || failed ? phase : "waiting";
  document.title = `${words.phase[phase] ?? phase} · Shoehorn`;
  say("model", state.model);

  byId("start").hidden = ready || failed;
  byId("failure").hidden = !failed;
  byId("use").hidden = !ready;

  showSteps(phase);
  say("headline", words.headline[phase] ?? "");
  const bar = byId("progress");
  if (state.progress === null) bar.removeAttribute("value");
  else bar.value = state.progress;
  say("detail", state.detail);
  const downloading = phase === "pulling" && state.bytes_total > 0;
  say("amount", downloading ? `${size(state.bytes_done)} / ${size(state.bytes_total)}` : "");
  say("percent", state.progress === null ? "" : `${Math.floor(state.progress * 100)} %`);
  say("elapsed", state.since > 0 ? words.elapsed(duration(Math.max(0, now - state.since))) : "");

  say("cause", state.cause);
  say("remedy", state.remedy);
  byId("remedy-title").hidden = !state.remedy;
  say("curl", curl(state.model));
}

async function refresh() {
  try {
    const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(String(answer.status));
    const clock = Date.parse(answer.headers.get("Date")) || Date.now(); // the server's: this machine's may be off
    show(await answer.json(), clock / 1000);
    say("connection", "");
  } catch {
    say("connection", words.lost);
  }
  setTimeout(refresh, 2000);
}

async function copy() {
  const button = byId("copy");
  const range = document.createRange();
  range.selectNodeContents(byId("curl"));
  getSelection().removeAllRanges();
  getSelection().addRange(range); // over plain HTTP browsers give no clipboard, but let a selection be copied
  const done = navigator.clipboard
    ? await navigator.clipboard.writeText(byId("curl").textContent).then(() => true, () => false)
    : document.execCommand("copy");
  if (!done) return;
  button.textContent = words.copied;
  setTimeout(() => { button.textContent = words.copy; }, 1500);
}

document.documentElement.lang = chinese ? "zh-CN" : "en";
for (const item of document.querySelectorAll("#steps li")) item.textContent = words.steps[item.dataset.step];
say("failure-title", words.failure);
say("remedy-title", words.remedy);
say("use-title", words.use);
say("copy", words.copy);
say("key-note", words.key);
byId("copy").addEventListener("click", copy);
refresh();
