// Requests to the API: errors with the server's message, and streamed answers.

// `status` is 0 without an answer; `waitSeconds` is Retry-After, or 0.
export class ServerError extends Error {
  constructor(message, status = 0, waitSeconds = 0) {
    super(message);
    this.status = status;
    this.waitSeconds = waitSeconds;
  }
}

// Requests a path of the API; throws ServerError for every refusal, and the AbortError of `signal`.
export async function ask(path, key, body, signal) {
  const headers = { Authorization: `Bearer ${key}` };
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store",
    });
  } catch (error) {
    if (error instanceof TypeError) throw new ServerError("");
    throw error;
  }
  if (answer.ok) return answer;
  throw new ServerError(words(await answer.text()), answer.status, Number(answer.headers.get("Retry-After")) || 0);
}

function words(text) {
  try {
    return String(JSON.parse(text).error.message);
  } catch (error) {
    if (!(error instanceof SyntaxError || error instanceof TypeError)) throw error;
    return "";
  }
}

// Yields the data of each server-sent event of a body.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

// Yields the pieces of a chat answer: {reasoning, content, usage, finish}. Throws ServerError when the stream contains
// an error or is incomplete.
export async function* chat(body, key, signal) {
  const answer = await ask("v1/chat/completions", key, {
    ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
  }, signal);
  try {
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(String(event.error.message ?? event.error), Number(event.error.code) || 0);
      const choice = event.choices?.[0];
      yield {
        reasoning: choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "",
        content: choice?.delta?.content ?? "", usage: event.usage ?? null, finish: choice?.finish_reason ?? "",
      };
    }
  } catch (error) {
    if (error instanceof TypeError || error instanceof SyntaxError) throw new ServerError("", -1); // interrupted
    throw error;
  }
  throw new ServerError("", -1);
}
