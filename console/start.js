// Requests go to the page's own origin, which may differ from the issuer's.
const base = new URL(".", location.href).href.replace(/\/$/, "");
fetch(`${base}/openapi.json`).then((response) => response.json()).then((spec) => SwaggerUIBundle({
  spec: { ...spec, servers: [{ url: base }] },
  dom_id: "#docs",
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
}));
