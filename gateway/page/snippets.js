// Example calls to paste, with this server's address and model, and the key from the environment.
import { byId, make, say, t } from "./words.js";

const base = () => new URL("v1", location.href).href;

const json = (value) => JSON.stringify(value);
const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(model, prompt) {
  const body = `{"model": ${json(model)}, "stream": true,\n       "messages": [{"role": "user", "content": ${json(prompt)}}]}`;
  return [
    `curl -N ${inShell(`${base()}/chat/completions`)} \\`,
    `  -H "Authorization: Bearer $SHOEHORN_API_KEY" \\`,
    `  -H "Content-Type: application/json" \\`,
    `  -d ${inShell(body)}`,
  ].join("\n");
}

export function openai(model, prompt) {
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${json(base())}, api_key=os.environ["SHOEHORN_API_KEY"])
for chunk in client.chat.completions.create(
    model=${json(model)},
    messages=[{"role": "user", "content": ${json(prompt)}}],
    stream=True,
):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
`;
}

export function langchain(model, prompt) {
  return `import os

from langchain_openai import ChatOpenAI

chat = ChatOpenAI(
    base_url=${json(base())},
    api_key=os.environ["SHOEHORN_API_KEY"],
    model=${json(model)},
)
for piece in chat.stream(${json(prompt)}):
    print(piece.content, end="", flush=True)
`;
}

// Calls of a model that returns a vector or a ranking instead of text.
const TEXT = "A shoehorn helps a foot into a shoe.";
const POOLING = {
  embed: ["embeddings", { input: TEXT }],
  reward: ["embeddings", { input: TEXT }],
  classify: ["rerank", { query: "What is a shoehorn?", documents: [TEXT, "Snow falls in winter."] }],
};

function pooling(model, task) {
  const [route, fields] = POOLING[task];
  const body = json({ model, ...fields });
  const client = `import os

from openai import OpenAI

client = OpenAI(base_url=${json(base())}, api_key=os.environ["SHOEHORN_API_KEY"])
print(client.post("/${route}", body=${body}, cast_to=object))
`;
  return {
    curl: [`curl ${inShell(`${base()}/${route}`)} \\`, `  -H "Authorization: Bearer $SHOEHORN_API_KEY" \\`,
      `  -H "Content-Type: application/json" \\`, `  -d ${inShell(body)}`].join("\n"),
    openai: client,
  };
}

export function showSnippets(model, task) {
  const texts = task in POOLING ? pooling(model, task)
    : { curl: curl(model, t("prompt")), openai: openai(model, t("prompt")), langchain: langchain(model, t("prompt")) };
  for (const id of ["curl", "openai", "langchain"]) {
    say(id, texts[id] ?? "");
    byId(id).closest("details").hidden = !(id in texts);
  }
}

// Copies the text of an element by selecting it: over plain HTTP browsers have no clipboard API, but copy a selection.
async function copied(source, text) {
  const range = document.createRange();
  range.selectNodeContents(source);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  return navigator.clipboard
    ? navigator.clipboard.writeText(text).then(() => true, () => false)
    : document.execCommand("copy");
}

async function copy(button, source, text) {
  if (!await copied(source, text)) return;
  button.textContent = t("copied");
  say("copied", t("copied"));
  setTimeout(() => { button.textContent = t("copy"); say("copied", ""); }, 1500);
}

// Creates a button that copies `text()` of its box or message.
export function copyButton(text) {
  const button = make("button", "quiet", t("copy"));
  button.type = "button";
  button.dataset.text = "copy";
  button.addEventListener("click", () => {
    const box = button.closest(".code, .message");
    copy(button, box.querySelector("pre, .text"), text());
  });
  return button;
}

export function setUp() {
  for (const button of document.querySelectorAll("[data-copy]")) {
    const source = byId(button.dataset.copy);
    button.addEventListener("click", () => copy(button, source, source.textContent));
  }
}
