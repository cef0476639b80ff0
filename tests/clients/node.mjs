// openai-node, and the AI SDK with @ai-sdk/openai (chat and Responses) and @ai-sdk/openai-compatible.
//
//     node node.mjs [URL [MODEL]]        in a folder with those packages, zod too
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const url = process.argv[2] ?? "http://127.0.0.1:8000";
const model = process.argv[3] ?? "duetto-demo";
const here = createRequire(`${process.cwd()}/x.mjs`);
const load = async (name) => import(pathToFileURL(here.resolve(name)).href);
const version = (name) => {
  for (const folder of here.resolve.paths(name)) {
    try {
      return here(`${folder}/${name}/package.json`).version;
    } catch {}
  }
};
const QUESTION = "Will it rain in Riga?";
let failed = 0;

async function run(name, needs, checks) {
  const found = [];
  try {
    for (const each of needs) found.push(await load(each));
  } catch (error) {
    console.log(`${name}: skipped, not installed (${error.code})`);
    return;
  }
  console.log(needs.map((each) => `${each} ${version(each)}`).join(", "));
  for (const check of checks(...found)) {
    try {
      await check();
      console.log(`  ok    ${check.name}`);
    } catch (error) {
      failed += 1;
      console.log(`  FAIL  ${check.name}\n        ${error.stack.split("\n").slice(0, 6).join("\n        ")}`);
    }
  }
}

await run("openai-node", ["openai", "zod"], ({ default: OpenAI }, { z }) => {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const messages = [{ role: "user", content: QUESTION }];
  const parameters = {
    type: "object",
    properties: { city: { type: "string", maxLength: 12 }, rains: { type: "boolean" } },
    required: ["city", "rains"],
    additionalProperties: false,
  };
  return [
    async function chat_stream_helper() {
      const stream = client.chat.completions.stream({ model, messages, max_tokens: 20 });
      const parts = [];
      stream.on("content", (delta) => parts.push(delta));
      assert.equal((await stream.finalChatCompletion()).choices[0].message.content, parts.join(""));
    },
    async function chat_tools() {
      const got = await client.chat.completions.create({
        model, messages, max_tokens: 200, tool_choice: "required",
        tools: [{ type: "function", function: { name: "weather", parameters } }],
      });
      const call = got.choices[0].message.tool_calls[0];
      assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["city", "rains"]);
    },
    async function run_tools() {
      const seen = [];
      const runner = client.chat.completions.runTools(
        {
          model, messages, max_tokens: 100, stream: true,
          tools: [{ type: "function", function: { name: "weather", parameters, parse: JSON.parse,
            function: (given) => { seen.push(given); return "sun"; } } }],
          tool_choice: { type: "function", function: { name: "weather" } },
        },
        { maxChatCompletions: 2 },
      );
      await runner.done();
      assert.ok("city" in seen[0]);
    },
    async function chat_parse() {
      const { zodResponseFormat } = await load("openai/helpers/zod");
      const Weather = z.object({ city: z.enum(["Riga", "Oslo"]), rains: z.boolean() });
      const got = await client.chat.completions.parse({
        model, messages, max_tokens: 200, response_format: zodResponseFormat(Weather, "weather"),
      });
      assert.equal(typeof got.choices[0].message.parsed.rains, "boolean");
    },
    async function responses() {
      const first = await client.responses.create({ model, input: QUESTION, max_output_tokens: 20 });
      const stream = client.responses.stream({
        model, input: "And in Oslo?", previous_response_id: first.id, max_output_tokens: 20,
      });
      let text = "";
      stream.on("response.output_text.delta", (event) => (text += event.delta));
      assert.equal((await stream.finalResponse()).output_text, text);
    },
    async function responses_parse() {
      const { zodTextFormat } = await load("openai/helpers/zod");
      const Weather = z.object({ city: z.enum(["Riga", "Oslo"]), rains: z.boolean() });
      const got = await client.responses.parse({
        model, input: QUESTION, max_output_tokens: 200, text: { format: zodTextFormat(Weather, "weather") },
      });
      assert.equal(typeof got.output_parsed.rains, "boolean");
    },
  ];
});

const sdk = (name, made) =>
  run(name, ["ai", name.split(" ")[0], "zod"], (ai, provider, { z }) => {
    const chosen = made(provider);
    const schema = z.object({ city: z.enum(["Riga", "Oslo"]), rains: z.boolean() });
    const tools = {
      weather: ai.tool({ description: "what it is like", inputSchema: schema, execute: () => "sun" }),
    };
    const ask = { model: chosen, prompt: QUESTION, maxOutputTokens: 200, maxRetries: 0 };
    const stops = { stopWhen: ai.stepCountIs?.(2) ?? ai.isStepCount?.(2) };
    return [
      async function text() {
        const got = await ai.generateText({ ...ask, maxOutputTokens: 20 });
        assert.ok(got.usage.outputTokens > 0);
      },
      async function text_streamed() {
        const got = ai.streamText({ ...ask, maxOutputTokens: 20, onError: () => {} });
        assert.equal(typeof (await got.text), "string");
        assert.ok((await got.usage).outputTokens > 0);
      },
      async function tools_run() {
        const got = await ai.generateText({ ...ask, tools, toolChoice: "required", ...stops });
        assert.equal(got.steps[0].toolResults[0].output, "sun");
        assert.equal(got.steps.length, 2);
      },
      async function tools_streamed() {
        const got = ai.streamText({ ...ask, tools, toolChoice: { type: "tool", toolName: "weather" }, onError: () => {} });
        assert.equal((await got.toolCalls)[0].toolName, "weather");
      },
      async function object() {
        const got = ai.generateObject
          ? (await ai.generateObject({ ...ask, schema })).object
          : (await ai.generateText({ ...ask, output: ai.Output.object({ schema }) })).output;
        assert.equal(typeof got.rains, "boolean");
      },
    ];
  });

const options = { baseURL: `${url}/v1`, apiKey: "none" };
await sdk("@ai-sdk/openai (Responses)", ({ createOpenAI }) => createOpenAI(options)(model));
await sdk("@ai-sdk/openai (chat)", ({ createOpenAI }) => createOpenAI(options).chat(model));
await sdk("@ai-sdk/openai-compatible (chat)", ({ createOpenAICompatible }) =>
  createOpenAICompatible({ ...options, name: "duetto", includeUsage: true, supportsStructuredOutputs: true })(model));
process.exit(failed ? 1 : 0);
