// Runs one stage of the module in V8: node [flags] drive.mjs MODULE STAGE
// QUICK INPUT_FOLDER [INPUT...], and prints its figures as JSON.
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [path, stage, quick, folder, ...inputs] = process.argv.slice(2);
const module = await WebAssembly.compile(readFileSync(path));
const imports = { bench: { now: () => performance.now() * 1e6 } };
for (const { module: from, name } of WebAssembly.Module.imports(module)) {
  // What is not the clock is never called: it would end the run.
  imports[from] ??= {};
  imports[from][name] ??= () => {
    throw new Error(`${from}.${name} was called`);
  };
}
const { exports } = await WebAssembly.instantiate(module, imports);
const write = (bytes) => {
  const at = exports.bench_room(bytes.length);
  new Uint8Array(exports.memory.buffer, at, bytes.length).set(bytes);
};
for (const name of inputs) {
  const label = Buffer.from(name);
  write(Buffer.concat([label, readFileSync(join(folder, name))]));
  exports.bench_take(label.length);
}
write(Buffer.from(stage));
const length = exports.bench_run(Number(quick));
process.stdout.write(Buffer.from(exports.memory.buffer, exports.bench_out(), length));
