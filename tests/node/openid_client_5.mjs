// As openid_client.mjs, with version 5, whose assertions name two audiences: the issuer and the token endpoint.
// CLIENT_ID=… CLIENT_SECRET=… EC_KEY=… OKP_KEY=… node openid_client_5.mjs ISSUER
import { Issuer } from 'openid-client-5'

const issuer = process.argv[2]
const { CLIENT_ID, CLIENT_SECRET, EC_KEY, OKP_KEY } = process.env

const authentications = {
  client_secret_basic: { client_secret: CLIENT_SECRET },
  client_secret_post: { client_secret: CLIENT_SECRET },
  'private_key_jwt ES256': { key: JSON.parse(EC_KEY) },
  'private_key_jwt Ed25519': { key: JSON.parse(OKP_KEY) },
}

async function life(found, method, { client_secret, key }) {
  const client = new found.Client(
    { client_id: CLIENT_ID, client_secret, token_endpoint_auth_method: method.split(' ')[0] },
    key && { keys: [key] },
  )
  const token = await client.grant({ grant_type: 'client_credentials', scope: 'read' })
  const introspected = await client.introspect(token.access_token)
  const refreshed = await client.refresh(token.refresh_token)
  await client.revoke(refreshed.refresh_token)
  const revoked = await client.introspect(refreshed.access_token)
  return { metadata: found.metadata, token, introspected, refreshed, revoked }
}

const failure = (error) => ({ error: String(error) })
const lives = {}
for (const document of ['openid-configuration', 'oauth-authorization-server']) {
  const found = await Issuer.discover(`${issuer}/.well-known/${document}`)
  for (const [method, authentication] of Object.entries(authentications)) {
    lives[`${document} ${method}`] = await life(found, method, authentication).catch(failure)
  }
}
console.log(JSON.stringify(lives))
