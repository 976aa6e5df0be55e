#!/bin/sh
# Makes the secrets of compose.yaml in docker/secrets/, each once: what exists is kept.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
chmod 0700 secrets

word() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { [ -s "secrets/$1" ] || printf '%s' "$2" > "secrets/$1"; }

keep database-password "$(word)"
keep emr-database-password "$(word)"
keep web-token "$(word)"
keep pacs-password "$(word)"
keep database-url "postgresql://seggate:$(cat secrets/database-password)@database:5432/seggate"
keep pacs-users.json "{\"RegisteredUsers\": {\"seggate\": \"$(cat secrets/pacs-password)\"}}"

# Compose mounts the files as they are, and the services run as different users: they must be readable.
# The folder is closed to everyone else on this machine.
chmod 0444 secrets/*
echo "secrets are in $(pwd)/secrets"
