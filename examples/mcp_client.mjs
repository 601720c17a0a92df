// An MCP client in JavaScript that signs in at Lanyard, by its secret or by its private key, and calls a tool.
//
// The MCP server's URL is among the agent's `audiences`, since the SDK asks for a token with it as `resource`.
//
//     npm install @modelcontextprotocol/client
//     CLIENT_ID=cid_… CLIENT_SECRET=cs_… node mcp_client.mjs secret http://localhost:8080 http://localhost:8000/mcp
//     CLIENT_ID=cid_… PRIVATE_KEY=private-key.pem node mcp_client.mjs key http://localhost:8080 http://localhost:8000/mcp

import { createPrivateKey } from 'node:crypto'
import { readFileSync } from 'node:fs'

import {
  Client,
  ClientCredentialsProvider,
  PrivateKeyJwtProvider,
  StreamableHTTPClientTransport,
} from '@modelcontextprotocol/client'

const [method, issuer, url] = process.argv.slice(2)
const { CLIENT_ID, CLIENT_SECRET, PRIVATE_KEY, SIGNING_ALGORITHM = 'ES256' } = process.env

/** Sign in with the client secret. */
function bySecret() {
  return new ClientCredentialsProvider({
    clientId: CLIENT_ID,
    clientSecret: CLIENT_SECRET,
    expectedIssuer: issuer,
  })
}

/** Sign in with a JWT made by the private key whose public half is in the agent's `jwks`. */
function byKey() {
  return new PrivateKeyJwtProvider({
    clientId: CLIENT_ID,
    // As a JWK: the SDK reads one form of PEM file only.
    privateKey: createPrivateKey(readFileSync(PRIVATE_KEY)).export({ format: 'jwk' }),
    algorithm: SIGNING_ALGORITHM,
    expectedIssuer: issuer,
  })
}

const authProvider = { secret: bySecret, key: byKey }[method]()
const client = new Client({ name: 'example', version: '1.0.0' })
await client.connect(new StreamableHTTPClientTransport(new URL(url), { authProvider }))
const result = await client.callTool({ name: 'whoami' })
console.log(result.structuredContent)
await client.close()
