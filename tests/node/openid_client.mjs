// Takes tokens through their whole life with openid-client, for each document of discovery and each method of
// authentication, and prints what each step answered.
// CLIENT_ID=… CLIENT_SECRET=… EC_KEY=… OKP_KEY=… node openid_client.mjs ISSUER
import * as client from 'openid-client'

const issuer = new URL(process.argv[2])
const { CLIENT_ID, CLIENT_SECRET, EC_KEY, OKP_KEY } = process.env

async function privateKey(text, algorithm) {
  const jwk = JSON.parse(text)
  return { key: await crypto.subtle.importKey('jwk', jwk, algorithm, false, ['sign']), kid: jwk.kid }
}

const authentications = {
  client_secret_basic: client.ClientSecretBasic(CLIENT_SECRET),
  client_secret_post: client.ClientSecretPost(CLIENT_SECRET),
  'private_key_jwt ES256': client.PrivateKeyJwt(
    await privateKey(EC_KEY, { name: 'ECDSA', namedCurve: 'P-256' }),
  ),
  'private_key_jwt Ed25519': client.PrivateKeyJwt(await privateKey(OKP_KEY, { name: 'Ed25519' })),
}

async function life(algorithm, authentication) {
  const options = { algorithm, execute: [client.allowInsecureRequests] } // plain http, on this machine only
  const config = await client.discovery(issuer, CLIENT_ID, undefined, authentication, options)
  const token = await client.clientCredentialsGrant(config, { scope: 'read' })
  const introspected = await client.tokenIntrospection(config, token.access_token)
  const refreshed = await client.refreshTokenGrant(config, token.refresh_token)
  await client.tokenRevocation(config, refreshed.refresh_token)
  const revoked = await client.tokenIntrospection(config, refreshed.access_token)
  return { metadata: config.serverMetadata(), token, introspected, refreshed, revoked }
}

const documents = { 'openid-configuration': 'oidc', 'oauth-authorization-server': 'oauth2' }
const failure = (error) => ({ error: String(error) })
const lives = {}
for (const [document, algorithm] of Object.entries(documents)) {
  for (const [method, authentication] of Object.entries(authentications)) {
    lives[`${document} ${method}`] = await life(algorithm, authentication).catch(failure)
  }
}
console.log(JSON.stringify(lives))
