{{/* Name of every object, and of the RayService itself: KubeRay derives longer names from it, so it takes 47 characters
at most, and it becomes a host name, so it starts with a letter. */}}
{{- define "moe-ray.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
  {{- $chart := .Values.nameOverride | default .Chart.Name -}}
  {{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- end -}}
{{- $name = $name | trunc 47 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
  {{- fail (printf "the name %q is no DNS-1035 label (lower-case letters, digits, '-', starting with a letter), which KubeRay demands: set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{/* What tells this release's Ray pods from all others. Not `app.kubernetes.io/name`: KubeRay gives its pods one of its
own, and selects the head by it in the Service <fullname>-head-svc. */}}
{{- define "moe-ray.podSelector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
moe-ray/app: {{ include "moe-ray.fullname" . }}
{{- end }}

{{/* Labels of objects; those of pods are in their templates. */}}
{{- define "moe-ray.labels" -}}
app.kubernetes.io/name: {{ include "moe-ray.chartName" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "moe-ray.chartName" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end }}

{{- define "moe-ray.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* The Service that KubeRay points at the cluster which serves now; its name and selector are KubeRay's. */}}
{{- define "moe-ray.serveService" -}}
{{- .Values.service.name | default (printf "%s-serve-svc" (include "moe-ray.fullname" .)) -}}
{{- end }}

{{- define "moe-ray.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "moe-ray.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* Whether KubeRay moves traffic in steps over a Gateway, in which mode it ignores the RayService's own Service. */}}
{{- define "moe-ray.incremental" -}}
{{- if eq .Values.upgradeStrategy.type "NewClusterWithIncrementalUpgrade" -}}yes{{- end -}}
{{- end }}

{{/* A Kubernetes quantity of bytes as a whole number; 0 for what is none. */}}
{{- define "moe-ray.bytes" -}}
{{- $text := toString . -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- mulf (float64 (trimSuffix $unit $text)) (float64 (get $units $unit)) | int64 -}}
{{- end }}

{{/* Names of the secrets: (dict "root" $ "section" .Values.auth.apiKeys "suffix" "api-keys"). */}}
{{- define "moe-ray.secretName" -}}
{{- .section.existingSecret | default (printf "%s-%s" (include "moe-ray.fullname" .root) .suffix) -}}
{{- end }}

{{/* A value of a secret of ours: the given one; else what the cluster already holds, so that an upgrade changes nothing;
else a new random one. (dict "root" $ "secret" name "key" key "value" given) */}}
{{- define "moe-ray.kept" -}}
{{- if .value -}}
{{- .value -}}
{{- else -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .secret | default dict -}}
{{- $kept := get ($found.data | default dict) .key -}}
{{- if $kept -}}{{- $kept | b64dec -}}{{- else -}}{{- randAlphaNum 48 -}}{{- end -}}
{{- end -}}
{{- end }}

{{- define "moe-ray.modelClaim" -}}
{{- .Values.model.volume.existingClaim | default (printf "%s-model" (include "moe-ray.fullname" .)) -}}
{{- end }}

{{- define "moe-ray.cacheClaim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "moe-ray.fullname" .)) -}}
{{- end }}

{{- define "moe-ray.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "moe-ray.fullname" .)) -}}
{{- end }}

{{/* The worker groups in use: name → values, as YAML. */}}
{{- define "moe-ray.workerGroups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.workerGroups -}}
  {{- if kindIs "map" $group -}}
  {{- if ne (toString $group.enabled) "false" -}}
    {{- $_ := set $groups $name $group -}}
  {{- end -}}
  {{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end }}

{{/* Environment that a pod of Ray needs, before what the values add. */}}
{{- define "moe-ray.env" -}}
- name: RAY_worker_niceness # else every level of actors runs 15 steps lower
  value: "0"
- name: XDG_CACHE_HOME
  value: {{ .Values.cache.mountPath }}
- name: HF_HOME
  value: {{ .Values.cache.mountPath }}/huggingface
- name: TRITON_CACHE_DIR
  value: {{ .Values.cache.mountPath }}/triton
- name: HOME # the image's own is read-only
  value: /tmp
{{- if .Values.auth.hfToken.enabled }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "moe-ray.secretName" (dict "root" . "section" .Values.auth.hfToken "suffix" "hf-token") }}
      key: {{ .Values.auth.hfToken.key }}
{{- end }}
{{- end }}

{{/* Secrets that trunk, experts and gateway read as configuration. */}}
{{- define "moe-ray.secretEnv" -}}
{{- with .Values.auth }}
{{- if .apiKeys.enabled }}
- name: MOE_RAY_GATEWAY__API_KEYS # a JSON list
  valueFrom:
    secretKeyRef:
      name: {{ include "moe-ray.secretName" (dict "root" $ "section" .apiKeys "suffix" "api-keys") }}
      key: {{ .apiKeys.key }}
{{- end }}
{{- if .clusterToken.enabled }}
- name: MOE_RAY_CLUSTER_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "moe-ray.secretName" (dict "root" $ "section" .clusterToken "suffix" "cluster-token") }}
      key: {{ .clusterToken.key }}
{{- end }}
{{- end }}
{{- end }}

{{/* The volumes and mounts that every pod with our image has. */}}
{{- define "moe-ray.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: cache
  mountPath: {{ .root.Values.cache.mountPath }}
{{- if .root.Values.model.volume.enabled }}
- name: model
  mountPath: {{ .root.Values.model.volume.mountPath }}
  readOnly: {{ .readOnly }}
  {{- with .root.Values.model.volume.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "moe-ray.volumes" -}}
- name: tmp
  emptyDir: {}
- name: cache
{{- if .Values.cache.persistent }}
  persistentVolumeClaim:
    claimName: {{ include "moe-ray.cacheClaim" . }}
{{- else }}
  emptyDir:
    {{- with .Values.cache.sizeLimit }}
    sizeLimit: {{ . }}
    {{- else }} {}
    {{- end }}
{{- end }}
{{- if .Values.model.volume.enabled }}
- name: model
  persistentVolumeClaim:
    claimName: {{ include "moe-ray.modelClaim" . }}
{{- end }}
{{- end }}
