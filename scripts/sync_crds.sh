#!/bin/sh
# Copies the CRDs into the chart. crds/ is the source of truth; Helm installs only what lies in the chart's own crds/.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
mkdir -p "$root/charts/gpumeter/crds"
rm -f "$root/charts/gpumeter/crds/"*.yaml
cp "$root/crds/"*.yaml "$root/charts/gpumeter/crds/"
