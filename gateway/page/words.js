// All texts of the page, in English and Chinese. The browser's language is the default; a chosen language is stored.

export const TEXT = {
  en: {
    "other": "中文", "other.lang": "zh-CN",
    "phase.starting": "Starting", "phase.pulling": "Downloading", "phase.verifying": "Checking files",
    "phase.converting": "Converting", "phase.loading": "Loading", "phase.ready": "Ready",
    "phase.stepping_down": "Trying a smaller plan", "phase.failed": "Failed", "phase.stopping": "Stopping",
    "phase.idle": "Idle", "phase.waiting": "Waiting",
    "headline.starting": "Detecting hardware and planning", "headline.pulling": "Downloading the model",
    "headline.verifying": "Checking every file", "headline.converting": "Converting the weights",
    "headline.loading": "Loading the model", "headline.stepping_down": "Out of memory; trying a smaller plan",
    "headline.stopping": "Stopping", "headline.waiting": "Waiting for other machines",
    "machines": "Replicas", "replica.ready": "ready", "replica.draining": "no new requests", "replica.lost": "lost",
    "step.prepare": "Plan", "step.fetch": "Download", "step.load": "Load", "step.ready": "Ready",
    "failure": "The model is unavailable", "remedy": "What to do",
    "lost": "Connection lost; reconnecting.",
    "again": "The engine is temporarily unavailable ({0}). It restarts automatically; this conversation is kept.",
    "back": "The engine is ready again.",
    "idle": "The engine is stopped because nobody used it. Your next message starts it, which takes a while.",
    "key.wrong": "This key was refused. Check that it is complete, or create a new one.",
    "edit": "Edit", "editing": "You are editing an earlier question. Sending it replaces what follows.",
    "edit.cancel": "Cancel", "options": "Options", "option.system": "System prompt",
    "option.temperature": "Temperature (0 to 2)", "option.length": "Longest answer (tokens)",
    "option.default": "Default",
    "left": "{0} left", "elapsed": "for {0}", "second": "s", "minute": "min", "hour": "h",
    "chat": "Chat", "clear": "New conversation", "key": "API key", "key.use": "Use this key",
    "key.note": "Stored for this tab only. If you lost it, create a new one inside the container:",
    "key.held": "Your key is stored for this tab only.", "key.forget": "Forget the key",
    "message": "Your message", "message.note": "Enter to send, Shift+Enter for a new line.",
    "send": "Send", "stop": "Stop", "you": "You", "model": "Model", "reasoning": "Reasoning",
    "answering": "The model is responding.", "answered": "Response complete.", "stopped": "Stopped.",
    "cut": "Truncated at the token limit.", "broken": "The connection was lost before the response was complete.",
    "unreachable": "The server is unreachable.", "wait": "Retry in {0}.", "status": "Status {0}",
    "speed": "{0} tokens/s", "context": "Context: {0} of {1} tokens", "context.only": "Context: {0} tokens",
    "use": "Use the API", "use.note": "The key is read from the environment:", "copy": "Copy", "copied": "Copied",
    "prompt": "What is your name?", "first": "first token after {0} s", "again.answer": "Regenerate",
    "model.choice": "Model", "ideas": "Try asking:", "idea.name": "What is your name?",
    "idea.explain": "Explain in three sentences how to run a model that does not fit into GPU memory.",
    "idea.write": "Write a Python function that checks whether a word is a palindrome.",
    "figures": "Details", "figures.of": "Details of GPU {0}",
    "serves.embed": "This model returns embeddings, not text.",
    "serves.classify": "This model returns rankings and scores, not text.",
    "serves.reward": "This model returns scores, not text.",
    "plan": "The plan", "plan.context": "Context", "plan.requests": "Concurrent requests", "plan.weights": "Weights",
    "plan.kv": "KV cache, all requests", "plan.host": "Host memory", "plan.offloaded": "of which offloaded weights",
    "plan.speed": "Expected speed", "plan.disk": "Model files", "plan.start": "Last start",
    "start.total": "{0} s: {1}", "start.plan": "plan {0} s", "start.pull": "download {0} s",
    "start.convert": "conversion {0} s", "start.import": "import of vLLM {0} s", "start.read": "reading weights {0} s",
    "start.repack": "repacking weights {0} s", "start.compile": "compilation {0} s", "start.graphs": "CUDA graphs {0} s",
    "start.cache": "KV cache {0} s", "start.warm_up": "warm-up {0} s", "start.other": "other {0} s",
    "tokens": "{0} tokens",
    "speed.one": "{0} tokens/s for one request", "speed.eight": "{0} tokens/s for eight concurrent requests",
    "as-is": "original format of the checkpoint", "nf4": "quantized to NF4", "int4": "quantized to INT4",
    "cpu": "Runs on the CPU; no VRAM is used.", "gpu": "VRAM of GPU {0}", "part": "Part",
    "expected": "Expected", "measured": "Measured", "total": "Total", "of": "{0} of {1}",
    "unknown": "unknown", "reserve": "reserved for use under load",
    "picture": "{0}: {1}",
    "part.weights": "Weights", "part.quant_state": "Quantization state",
    "part.embeddings": "Embeddings and output head",
    "part.offload_buffer": "Offload buffers", "part.kv_cache": "KV cache", "part.activations": "Activations",
    "part.cuda_graphs": "CUDA graphs", "part.framework": "Framework", "part.free": "Remaining within the limit",
  },
  zh: {
    "other": "English", "other.lang": "en",
    "phase.starting": "启动中", "phase.pulling": "下载中", "phase.verifying": "校验中", "phase.converting": "转换中",
    "phase.loading": "加载中", "phase.ready": "就绪", "phase.stepping_down": "缩减方案中", "phase.failed": "失败",
    "phase.stopping": "停止中", "phase.idle": "休眠", "phase.waiting": "等待中",
    "headline.starting": "正在检测硬件并制定方案", "headline.pulling": "正在下载模型",
    "headline.verifying": "正在校验每个文件", "headline.converting": "正在转换权重", "headline.loading": "正在加载模型",
    "headline.stepping_down": "显存不足，正在尝试更小的方案", "headline.stopping": "正在停止",
    "headline.waiting": "正在等待其他机器",
    "machines": "副本", "replica.ready": "就绪", "replica.draining": "不再接收新请求", "replica.lost": "失联",
    "step.prepare": "规划", "step.fetch": "下载", "step.load": "加载", "step.ready": "就绪",
    "failure": "模型不可用", "remedy": "解决办法",
    "lost": "连接已断开，正在重新连接。",
    "again": "引擎暂时不可用（{0}），将自动重启；对话内容会保留。",
    "back": "引擎已恢复就绪。",
    "idle": "引擎因长时间无人使用而停止。发送下一条消息即可唤醒，启动需要一些时间。",
    "key.wrong": "密钥无效，请检查是否完整，或重新生成一个。",
    "edit": "编辑", "editing": "正在编辑之前的问题，发送后会替换其后的内容。", "edit.cancel": "取消",
    "options": "选项", "option.system": "系统提示词", "option.temperature": "温度（0 到 2）",
    "option.length": "回答最大长度（token）", "option.default": "默认",
    "left": "剩余 {0}", "elapsed": "已用 {0}", "second": "秒", "minute": "分", "hour": "小时",
    "chat": "对话", "clear": "新对话", "key": "API 密钥", "key.use": "使用此密钥",
    "key.note": "仅保存在此标签页中。如果密钥丢失，可在容器内运行以下命令重新生成：",
    "key.held": "您的密钥仅保存在此标签页中。", "key.forget": "清除密钥",
    "message": "您的消息", "message.note": "Enter 发送，Shift + Enter 换行。",
    "send": "发送", "stop": "停止", "you": "您", "model": "模型", "reasoning": "思考过程",
    "answering": "模型正在回答。", "answered": "回答完毕。", "stopped": "已停止。",
    "cut": "已达到 token 上限，回答被截断。", "broken": "连接在回答完成前中断。",
    "unreachable": "无法连接服务器。", "wait": "请在 {0}后重试。", "status": "状态码 {0}",
    "speed": "{0} token/秒", "context": "上下文：{0} / {1} token", "context.only": "上下文：{0} token",
    "use": "调用 API", "use.note": "密钥从环境变量读取：", "copy": "复制", "copied": "已复制",
    "prompt": "你叫啥?", "first": "首个 token 用时 {0} 秒", "again.answer": "重新回答",
    "model.choice": "模型", "ideas": "试试这样问：", "idea.name": "你叫啥?",
    "idea.explain": "用三句话说明：显存放不下的模型如何运行？",
    "idea.write": "写一个 Python 函数，判断一个单词是不是回文。",
    "figures": "详情", "figures.of": "GPU {0} 详情",
    "serves.embed": "该模型返回嵌入向量，不生成文本。", "serves.classify": "该模型返回排序和分数，不生成文本。",
    "serves.reward": "该模型返回分数，不生成文本。",
    "plan": "方案", "plan.context": "上下文长度", "plan.requests": "并发请求数", "plan.weights": "权重",
    "plan.kv": "KV 缓存（全部请求合计）", "plan.host": "主机内存", "plan.offloaded": "其中卸载的权重",
    "plan.speed": "预期速度", "plan.disk": "模型文件", "plan.start": "上次启动",
    "start.total": "{0} 秒:{1}", "start.plan": "规划 {0} 秒", "start.pull": "下载 {0} 秒",
    "start.convert": "转换 {0} 秒", "start.import": "导入 vLLM {0} 秒", "start.read": "读取权重 {0} 秒",
    "start.repack": "重排权重 {0} 秒", "start.compile": "编译 {0} 秒", "start.graphs": "CUDA 图 {0} 秒",
    "start.cache": "KV 缓存 {0} 秒", "start.warm_up": "预热 {0} 秒", "start.other": "其他 {0} 秒",
    "tokens": "{0} token",
    "speed.one": "单个请求 {0} token/秒", "speed.eight": "八个请求合计 {0} token/秒",
    "as-is": "保持检查点原格式", "nf4": "量化为 NF4", "int4": "量化为 INT4",
    "cpu": "在 CPU 上运行，不使用显存。", "gpu": "GPU {0} 的显存", "part": "组成部分",
    "expected": "预期", "measured": "实测", "total": "合计", "of": "{0} / {1}",
    "unknown": "未知", "reserve": "预留，负载时使用",
    "picture": "{0}：{1}",
    "part.weights": "权重", "part.quant_state": "量化状态", "part.embeddings": "嵌入层与输出头",
    "part.offload_buffer": "卸载缓冲区", "part.kv_cache": "KV 缓存", "part.activations": "激活值",
    "part.cuda_graphs": "CUDA Graph", "part.framework": "框架开销", "part.free": "限额内剩余",
    // The server's details of a phase, by its English text.
    "detail.planning": "制定方案", "detail.starting the engine": "正在启动引擎",
    "detail.starting the engine again": "正在重新启动引擎", "detail.loading the weights": "正在加载权重",
    "detail.measuring memory and warming up": "正在测量显存并预热",
    "detail.compiling and capturing graphs": "正在编译并捕获计算图", "detail.opening the API": "正在开放 API",
    "detail.the engine hangs": "引擎无响应", "detail.draining": "正在等待未完成的回答",
    "detail.drained; can be stopped": "请求已处理完毕，可以停止", "detail.stopping": "正在停止", "detail.serving": "服务中",
    "detail.out_of_memory": "显存不足",
  },
};

const NAME = "shoehorn.language";

// Storage may be blocked; the page works without it.
export function keep(storage, name, value) {
  try {
    if (value === "") window[storage].removeItem(name);
    else window[storage].setItem(name, value);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
  }
}

export function kept(storage, name) {
  try {
    return window[storage].getItem(name) ?? "";
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    return "";
  }
}

let language = kept("localStorage", NAME);
if (!(language in TEXT)) language = (navigator.language || "").toLowerCase().startsWith("zh") ? "zh" : "en";

// The text of a key, with {0}, {1} replaced.
export function t(key, ...values) {
  const text = TEXT[language][key] ?? TEXT.en[key] ?? key;
  return text.replace(/\{(\d)\}/g, (_, place) => values[Number(place)] ?? "");
}

// Translates the server's details of a phase; unknown details stay in English.
export const detail = (text) => TEXT[language][`detail.${text}`] ?? text;

export const locale = () => (language === "zh" ? "zh-CN" : "en");

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  keep("localStorage", NAME, language);
}

export const byId = (id) => document.getElementById(id);

// Unchanged text is not set again, so that screen readers do not repeat it.
export function say(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

// Creates an element with class and text.
export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

// Fills in the texts that the document names by key.
export function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of root.querySelectorAll("[data-placeholder]")) element.placeholder = t(element.dataset.placeholder);
}
