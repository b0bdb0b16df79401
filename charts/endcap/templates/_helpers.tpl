{{- define "endcap.labels" -}}
app.kubernetes.io/part-of: endcap
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* (dict "root" $ "name" "endcap-operator"): what selects the pods of one workload. */}}
{{- define "endcap.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end -}}

{{- define "endcap.selectorFlow" -}}
{app.kubernetes.io/name: {{ .name }}, app.kubernetes.io/instance: {{ .root.Release.Name }}}
{{- end -}}

{{/* (dict "root" $ "name" "endcap-operator"): all labels of one workload. */}}
{{- define "endcap.workloadLabels" -}}
app.kubernetes.io/name: {{ .name }}
{{ include "endcap.labels" .root }}
{{- end -}}

{{/* (dict "root" $ "image" "endcap/server"): ours, with registry and tag. */}}
{{- define "endcap.image" -}}
{{- $images := .root.Values.images -}}
{{- with $images.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image }}
{{- if not (regexMatch "(:[^/]+|@sha256:[0-9a-f]{64})$" .image) }}:{{ $images.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end -}}

{{- define "endcap.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Restricted Pod Security, of a pod and of a container. 65532 is the images' user. */}}
{{- define "endcap.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "endcap.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* (dict "root" $ "name" ...): over zones as evenly as there is room, and over nodes. */}}
{{- define "endcap.spread" -}}
- maxSkew: 1
  topologyKey: topology.kubernetes.io/zone
  whenUnsatisfiable: ScheduleAnyway
  labelSelector: {matchLabels: {{ include "endcap.selectorFlow" . }}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector: {matchLabels: {{ include "endcap.selectorFlow" . }}}
{{- end -}}

{{/* (dict "nodeSelector" ... "tolerations" ... "priorityClassName" ...) */}}
{{- define "endcap.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 0 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "endcap.mlflowUrl" -}}
{{- if .Values.mlflow.install -}}
http://endcap-mlflow.{{ .Release.Namespace }}.svc:5000
{{- else -}}
{{ .Values.mlflow.url }}
{{- end -}}
{{- end -}}

{{- define "endcap.redisUrl" -}}
{{- if .Values.redis.install -}}
redis://endcap-redis.{{ .Release.Namespace }}.svc:6379/0
{{- else -}}
{{ .Values.redis.url }}
{{- end -}}
{{- end -}}

{{/* What values contradict themselves in, said before anything is applied. */}}
{{- define "endcap.check" -}}
{{- if and .Values.mlflow.install .Values.mlflow.url }}
{{- fail "mlflow: give a url or install: true, not both" }}
{{- end }}
{{- if and .Values.redis.install .Values.redis.url }}
{{- fail "redis: give a url or install: true, not both" }}
{{- end }}
{{- if and .Values.runtimes.cache (not (include "endcap.redisUrl" .)) }}
{{- fail "runtimes.cache needs a Redis: give redis.url, or redis.install: true" }}
{{- end }}
{{- if and .Values.redis.install .Values.redis.passwordSecret }}
{{- fail "redis.passwordSecret is for a Redis of your own: the simple one has no password" }}
{{- end }}
{{- if and .Values.collector.route.enabled (not .Values.collector.route.gateway.name) }}
{{- fail "collector.route needs the name of a Gateway: collector.route.gateway.name" }}
{{- end }}
{{- if and .Values.loadTest.enabled (or (not .Values.loadTest.url) (eq (not .Values.loadTest.configMap) (not .Values.loadTest.claim))) }}
{{- fail "loadTest needs url, and shoppers.jsonl in one of configMap and claim" }}
{{- end }}
{{- if and .Values.drills.enabled (or (not .Values.drills.namespace) (not .Values.drills.service)) }}
{{- fail "drills needs namespace and service: whose pods are killed" }}
{{- end }}
{{- end -}}
