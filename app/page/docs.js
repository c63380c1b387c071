// The page at `/docs`: draws /openapi.json, so that nothing comes from another host.

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const code = (text) => element("code", "", text);

// Our descriptions are plain text with `code` in it.
function prose(text) {
  const parts = text.split("`");
  return element("p", "", ...parts.map((part, index) => (index % 2 ? code(part) : part)));
}

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.filter((choice) => choice.type !== "null").map(typeOf).join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  if (schema.format === "binary") return "file";
  const bounds = [];
  if (schema.minimum !== undefined) bounds.push(`from ${schema.minimum}`);
  if (schema.maximum !== undefined) bounds.push(`to ${schema.maximum}`);
  return [schema.type ?? "any", ...bounds].join(" ");
}

function rowOf(name, schema, description) {
  const fallback = schema.default === undefined || schema.default === null ? "" : JSON.stringify(schema.default);
  return element(
    "tr",
    "",
    element("td", "", code(name)),
    element("td", "", typeOf(schema)),
    element("td", "", fallback),
    element("td", "", ...prose(description ?? schema.description ?? "").childNodes),
  );
}

function tableOf(heads, rows) {
  const head = element("tr", "", ...heads.map((text) => element("th", "", text)));
  return element("div", "scroll", element("table", "", element("thead", "", head), element("tbody", "", ...rows)));
}

function parametersOf(operation) {
  const rows = (operation.parameters ?? []).map((parameter) =>
    rowOf(parameter.name, parameter.schema, parameter.description),
  );
  return rows.length ? [element("h4", "", "Parameters"), tableOf(["Name", "Type", "Default", ""], rows)] : [];
}

function bodyOf(operation) {
  const content = operation.requestBody?.content;
  if (!content) return [];
  const kinds = Object.keys(content).flatMap((kind, index) => (index ? [", ", code(kind)] : [code(kind)]));
  // What may stand in the query is in the table above already.
  const above = new Set((operation.parameters ?? []).map((parameter) => parameter.name));
  const rows = Object.entries(content["application/json"]?.schema?.properties ?? {})
    .filter(([name]) => !above.has(name))
    .map(([name, schema]) => rowOf(name, schema));
  const members = rows.length ? [tableOf(["JSON member", "Type", "Default", ""], rows)] : [];
  return [element("h4", "", "Body"), element("p", "", ...kinds), ...members];
}

function answersOf(operation) {
  const found = Object.entries(operation.responses ?? {}).filter(([status]) => status.startsWith("2"));
  return found.flatMap(([status, response]) => {
    const kinds = Object.keys(response.content ?? {});
    const list = kinds.flatMap((kind, index) => (index ? [", ", code(kind)] : [" ", code(kind)]));
    return [element("h4", "", "Answer"), element("p", "", status, ...list)];
  });
}

function routeOf(path, method, operation) {
  const title = element("h3", "", element("span", "method", method.toUpperCase()), code(path));
  const route = element("section", "route", title, prose(operation.description ?? operation.summary ?? ""));
  route.id = anchorOf(path, method);
  for (const sample of operation["x-codeSamples"] ?? []) {
    route.append(element("pre", "", sample.source.replaceAll("{origin}", location.origin)));
  }
  route.append(...parametersOf(operation), ...bodyOf(operation), ...answersOf(operation));
  return route;
}

const anchorOf = (path, method) => `${method}${path.replace(/[^a-z]+/g, "-")}`;

function problemsOf(problems) {
  const rows = problems.map(({ code: name, status, title }) => {
    const row = element(
      "tr",
      "",
      element("td", "", code(name)),
      element("td", "", String(status)),
      element("td", "", title),
    );
    row.id = name;
    return row;
  });
  const say = "Every error is application/problem+json with one of these codes; codes are stable, texts are not.";
  return element("section", "problems", element("p", "quiet", say), tableOf(["Code", "Status", ""], rows));
}

function draw(description) {
  document.getElementById("lead").textContent = description.info.description;
  const byTag = new Map();
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "more";
      byTag.set(tag, [...(byTag.get(tag) ?? []), [path, method, operation]]);
    }
  }
  const routes = document.getElementById("routes");
  const contents = document.getElementById("contents");
  for (const [tag, operations] of byTag) {
    routes.append(element("h2", "", tag), ...operations.map((operation) => routeOf(...operation)));
    const links = operations.map(([path, method]) => {
      const link = element("a", "", element("span", "method", method.toUpperCase()), path);
      link.href = `#${anchorOf(path, method)}`;
      return link;
    });
    contents.append(element("div", "", element("h2", "", tag), ...links));
  }
  routes.append(element("h2", "", "Errors"), problemsOf(description["x-problems"] ?? []));
  // The place that the address names was not there when the browser looked for it.
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

async function open() {
  const lead = document.getElementById("lead");
  try {
    draw(await (await fetch("/openapi.json")).json());
  } catch {
    lead.textContent = "openapi.json could not be read. Is the service still running?";
  }
}

open();
