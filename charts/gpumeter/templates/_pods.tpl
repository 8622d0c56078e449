{{/* What the pods of operator, collector and gateway have in common. */}}

{{/* Scheduling and identity: (dict "root" $ "part" "operator" "values" .Values.operator) */}}
{{- define "gpumeter.podSpec" -}}
serviceAccountName: {{ include "gpumeter.fullname" .root }}-{{ .part }}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "gpumeter.podMetadata" -}}
labels:
  {{- include "gpumeter.labels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Image, security, probes and resources of the one container; health and metrics are on port 8080 in all three. */}}
{{- define "gpumeter.container" -}}
image: {{ include "gpumeter.image" (dict "root" .root "image" .root.Values.image) | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args: [{{ .part }}]
securityContext:
  {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
startupProbe:
  httpGet: {path: /healthz, port: 8080}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: 8080}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: 8080}
  periodSeconds: 2
  timeoutSeconds: 5
resources:
  {{- toYaml .values.resources | nindent 2 }}
{{- end }}

{{/* Environment that all three read. */}}
{{- define "gpumeter.environment" -}}
- name: GPUMETER_NAMESPACE
  valueFrom:
    fieldRef: {fieldPath: metadata.namespace}
- name: GPUMETER_MASTER_KEY_FILE
  value: /etc/gpumeter/master/master-key
- name: GPUMETER_LOG_LEVEL
  value: {{ .root.Values.logging.level | upper }}
- name: GPUMETER_LOG_FORMAT
  value: {{ .root.Values.logging.format }}
{{- end }}

{{- define "gpumeter.volumeMounts" -}}
- {name: master-key, mountPath: /etc/gpumeter/master, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "gpumeter.volumes" -}}
- name: master-key
  secret:
    secretName: {{ include "gpumeter.masterKeySecret" .root | quote }}
    defaultMode: 0440
    items: [{key: master-key, path: master-key}]
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
{{- end }}
