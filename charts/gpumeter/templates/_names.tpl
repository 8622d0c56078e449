{{/* Names, labels and images. With a release called gpumeter the parts are gpumeter-operator, -collector, -gateway. */}}

{{- define "gpumeter.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end }}

{{- define "gpumeter.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "gpumeter.name" .) .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "gpumeter.name" .) -}}
{{- end -}}
{{- end }}

{{/* Labels of one part: (dict "root" $ "part" "operator") */}}
{{- define "gpumeter.labels" -}}
{{ include "gpumeter.selector" . }}
app.kubernetes.io/part-of: gpumeter
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* A release may be called 2024, a namespace or a Secret true: names of others are quoted wherever they stand alone. */}}
{{- define "gpumeter.selector" -}}
app.kubernetes.io/name: {{ include "gpumeter.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{/* A full image reference: (dict "root" $ "image" .Values.image) */}}
{{- define "gpumeter.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end }}

{{- define "gpumeter.masterKeySecret" -}}
{{- .Values.masterKey.existingSecret | default (printf "%s-master-key" (include "gpumeter.fullname" .)) -}}
{{- end }}

{{- define "gpumeter.signingKeySecret" -}}
{{- .Values.signingKey.existingSecret | default (printf "%s-signing-key" (include "gpumeter.fullname" .)) -}}
{{- end }}

{{- define "gpumeter.ledgerClaim" -}}
{{- .Values.collector.persistence.existingClaim | default (printf "%s-ledger" (include "gpumeter.fullname" .)) -}}
{{- end }}

{{/* A duration such as 500ms, 2s, 5m or 1h in whole milliseconds; -1 for what is none. */}}
{{- define "gpumeter.milliseconds" -}}
{{- $text := toString . -}}
{{- if regexMatch "^[0-9]{1,9}(ms|s|m|h)$" $text -}}
{{- $number := regexFind "^[0-9]+" $text | int64 -}}
{{- $unit := regexFind "(ms|s|m|h)$" $text -}}
{{- mul $number (get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000) $unit) -}}
{{- else -}}
-1
{{- end -}}
{{- end }}

{{/* Who may reach workers, as the operator reads it: JSON, or nothing where there are to be no NetworkPolicies. */}}
{{- define "gpumeter.workerPeers" -}}
{{- with .Values.workers.networkPolicy -}}
{{- if .enabled -}}
{{- $peer := dict -}}
{{- range $part := list "operator" "collector" "gateway" -}}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" $.Release.Namespace) -}}
{{- $pods := dict "matchLabels" (fromYaml (include "gpumeter.selector" (dict "root" $ "part" $part))) -}}
{{- $_ := set $peer $part (dict "namespaceSelector" $namespace "podSelector" $pods) -}}
{{- end -}}
{{- $http := concat (list $peer.gateway $peer.operator) .scrapers -}}
{{- toJson (dict "http" $http "usage" (list $peer.collector) "egress" .egress) -}}
{{- end -}}
{{- end -}}
{{- end }}
