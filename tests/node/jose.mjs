// Verifies an access token as an API with jose does, and prints what it says.
// node jose.mjs ISSUER AUDIENCE ALG TOKEN
import { createRemoteJWKSet, jwtVerify } from 'jose'

const [issuer, audience, alg, token] = process.argv.slice(2)
const metadata = await (await fetch(`${issuer}/.well-known/oauth-authorization-server`)).json()
const keys = createRemoteJWKSet(new URL(metadata.jwks_uri))
const { payload, protectedHeader } = await jwtVerify(token, keys, {
  issuer,
  audience,
  typ: 'at+jwt',
  algorithms: [alg],
  requiredClaims: ['exp', 'sub', 'client_id', 'scope'],
})
console.log(JSON.stringify({ payload, protectedHeader }))
