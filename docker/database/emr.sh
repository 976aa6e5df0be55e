#!/bin/sh
# Runs once, when PostgreSQL makes its data folder: a database of its own for the EMR.
set -eu
psql -v ON_ERROR_STOP=1 -v password="$(cat /run/secrets/emr-database-password)" \
  --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE emr LOGIN PASSWORD :'password';
CREATE DATABASE emr OWNER emr;
SQL
