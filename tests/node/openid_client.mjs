// Takes a token through its whole life with openid-client, and prints what each step answered.
// CLIENT_ID=… CLIENT_SECRET=… PRIVATE_JWK=… node openid_client.mjs ISSUER METHOD
import * as client from 'openid-client'

const [issuer, method] = process.argv.slice(2)
const { CLIENT_ID, CLIENT_SECRET, PRIVATE_JWK } = process.env

async function privateKey() {
  const jwk = JSON.parse(PRIVATE_JWK)
  const algorithm = { name: 'ECDSA', namedCurve: 'P-256' }
  return { key: await crypto.subtle.importKey('jwk', jwk, algorithm, false, ['sign']), kid: jwk.kid }
}

const authentications = {
  client_secret_basic: async () => client.ClientSecretBasic(CLIENT_SECRET),
  client_secret_post: async () => client.ClientSecretPost(CLIENT_SECRET),
  private_key_jwt: async () => client.PrivateKeyJwt(await privateKey()),
}

const config = await client.discovery(
  new URL(issuer),
  CLIENT_ID,
  undefined,
  await authentications[method](),
  { algorithm: 'oauth2', execute: [client.allowInsecureRequests] }, // plain http, on this machine only
)
const token = await client.clientCredentialsGrant(config, { scope: 'read' })
const introspected = await client.tokenIntrospection(config, token.access_token)
const refreshed = await client.refreshTokenGrant(config, token.refresh_token)
await client.tokenRevocation(config, refreshed.refresh_token)
const revoked = await client.tokenIntrospection(config, refreshed.access_token)
console.log(JSON.stringify({ metadata: config.serverMetadata(), token, introspected, refreshed, revoked }))
