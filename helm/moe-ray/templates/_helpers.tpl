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

{{/* What tells this release's pods from all others. KubeRay leaves these labels as they are. */}}
{{- define "moe-ray.selectorLabels" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "moe-ray.labels" -}}
{{ include "moe-ray.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
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

{{/* Where the download Job puts the model. */}}
{{- define "moe-ray.downloadDirectory" -}}
{{- $download := .Values.model.download -}}
{{- printf "%s/%s" .Values.model.volume.mountPath ($download.directory | default (base $download.repo)) -}}
{{- end }}

{{/* What --model would say: a directory on the volume where the Job downloads it, else `model.path`. */}}
{{- define "moe-ray.modelPath" -}}
{{- if .Values.model.download.enabled -}}
{{- include "moe-ray.downloadDirectory" . -}}
{{- else -}}
{{- .Values.model.path -}}
{{- end -}}
{{- end }}

{{- define "moe-ray.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "moe-ray.fullname" .)) -}}
{{- end }}

{{/* The worker groups in use: name → values, as YAML. */}}
{{- define "moe-ray.workerGroups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.workerGroups -}}
  {{- if and $group (ne (toString $group.enabled) "false") -}}
    {{- $_ := set $groups $name $group -}}
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

{{/* The pod template of the head and of every worker group.
(dict "root" $ "group" name "role" head|trunk|experts|any "values" what overrides .Values.pod) */}}
{{- define "moe-ray.podTemplate" -}}
{{- $root := .root -}}
{{- $pod := mergeOverwrite (deepCopy $root.Values.pod) (deepCopy .values) -}}
{{- $head := eq .role "head" -}}
{{- $labels := dict "app.kubernetes.io/component" (ternary "head" "worker" $head) "moe-ray/group" .group -}}
{{- $gpu := ternary dict ($pod.gpu | default dict) $head -}}
{{- $gpus := int ($gpu.count | default 0) -}}
metadata:
  labels: # none with the chart's version: a changed template is a new cluster
    {{- include "moe-ray.selectorLabels" $root | nindent 4 }}
    {{- toYaml (merge $labels ($pod.labels | default dict) $root.Values.commonLabels) | nindent 4 }}
  annotations:
    # Secrets given in the values: a changed one makes KubeRay start a new cluster, beside the old one until it serves.
    moe-ray/secrets: {{ list $root.Values.auth.apiKeys.values $root.Values.auth.clusterToken.value $root.Values.auth.hfToken.value | toJson | sha256sum | trunc 16 }}
    {{- with $pod.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "moe-ray.serviceAccountName" $root }}
  serviceAccountName: {{ . }}
  {{- end }}
  # The autoscaler beside the head talks to Kubernetes; nothing else does.
  automountServiceAccountToken: {{ and $head $root.Values.autoscaler.enabled }}
  enableServiceLinks: false
  restartPolicy: {{ ternary "Never" "Always" $root.Values.autoscaler.enabled }}
  terminationGracePeriodSeconds: {{ $pod.terminationGracePeriodSeconds }}
  {{- with $pod.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $pod.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $pod.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  securityContext: {{- toYaml $pod.podSecurityContext | nindent 4 }}
  {{- $selector := deepCopy ($pod.nodeSelector | default dict) }}
  {{- if $gpu.type }}{{- $_ := set $selector $gpu.typeLabel $gpu.type }}{{- end }}
  {{- with $selector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $tolerations := $pod.tolerations | default list }}
  {{- if and $gpus $gpu.tolerate }}
  {{- $tolerations = append $tolerations (dict "key" $gpu.resource "operator" "Exists" "effect" "NoSchedule") }}
  {{- end }}
  {{- with $tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pod.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $spread := $pod.topologySpreadConstraints | default list }}
  {{- if not (or $head (eq $pod.spread "none")) }}
  {{- $match := merge (dict "moe-ray/group" .group) (include "moe-ray.selectorLabels" $root | fromYaml) }}
  {{- $unsatisfiable := ternary "DoNotSchedule" "ScheduleAnyway" (eq $pod.spread "hard") }}
  {{- $spread = append $spread (dict "maxSkew" 1 "topologyKey" "kubernetes.io/hostname" "whenUnsatisfiable" $unsatisfiable "labelSelector" (dict "matchLabels" $match)) }}
  {{- end }}
  {{- with $spread }}
  topologySpreadConstraints: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $wait := and $root.Values.model.waitForFiles.enabled (hasPrefix "/" (include "moe-ray.modelPath" $root)) }}
  {{- $native := $root.Values.model.nativeLibraries }}
  {{- if or $native.enabled $wait $pod.initContainers }}
  initContainers:
    {{- if $native.enabled }}
    # KubeRay puts a command of its own in the place of the image's entrypoint.
    - name: native-libraries
      image: {{ include "moe-ray.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: {{- toYaml $native.command | nindent 8 }}
      env: {{- include "moe-ray.env" $root | nindent 8 }}
      resources: {{- toYaml $native.resources | nindent 8 }}
      securityContext: {{- toYaml $pod.securityContext | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: cache
          mountPath: {{ $root.Values.cache.mountPath }}
    {{- end }}
    {{- if $wait }}
    # Also on the head, where Serve builds the application: a build that does not find the model is not tried again.
    - name: wait-for-model
      image: {{ include "moe-ray.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [python, /scripts/wait_for_model.py]
      env:
        - name: MODEL
          value: {{ include "moe-ray.modelPath" $root }}
        - name: NEEDS_MARK # the Job's, so that no half of a download is served
          value: {{ ternary "1" "" $root.Values.model.download.enabled | quote }}
        - name: TIMEOUT_S
          value: {{ $root.Values.model.waitForFiles.timeoutSeconds | quote }}
      resources: {{- toYaml $root.Values.model.waitForFiles.resources | nindent 8 }}
      securityContext: {{- toYaml $pod.securityContext | nindent 8 }}
      volumeMounts:
        - name: scripts
          mountPath: /scripts
          readOnly: true
        {{- include "moe-ray.volumeMounts" (dict "root" $root "readOnly" true) | nindent 8 }}
        {{- with $pod.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- end }}
    {{- with $pod.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" $head }}
      image: {{ include "moe-ray.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        {{- if $head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: as-metrics, containerPort: 44217}
        - {name: dash-metrics, containerPort: 44227}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: {{ $root.Values.serve.port }}}
      env:
        {{- include "moe-ray.env" $root | nindent 8 }}
        {{- with include "moe-ray.secretEnv" $root }}
        {{- . | trim | nindent 8 }}
        {{- end }}
        {{- with $pod.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $pod.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- $resources := deepCopy $pod.resources }}
      {{- if $gpus }}
      {{- range $kind := list "requests" "limits" }}
      {{- $_ := set $resources $kind (merge (dict $gpu.resource $gpus) (get $resources $kind | default dict)) }}
      {{- end }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      securityContext: {{- toYaml $pod.securityContext | nindent 8 }}
      {{- range $probe := list "livenessProbe" "readinessProbe" "startupProbe" }}
      {{- with get $pod $probe }}
      {{ $probe }}: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
      {{- with $pod.lifecycle }}
      lifecycle: {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: shm # Ray's object store
          mountPath: /dev/shm
        {{- include "moe-ray.volumeMounts" (dict "root" $root "readOnly" true) | nindent 8 }}
        {{- if $root.Values.tls.enabled }}
        - name: tls
          mountPath: {{ $root.Values.tls.mountPath }}
          readOnly: true
        {{- end }}
        {{- with $pod.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $pod.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $pod.shmSize }}
    {{- include "moe-ray.volumes" $root | nindent 4 }}
    {{- if $wait }}
    - name: scripts
      configMap:
        name: {{ include "moe-ray.fullname" $root }}-scripts
    {{- end }}
    {{- if $root.Values.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "moe-ray.tlsSecret" $root }}
        defaultMode: 0440
    {{- end }}
    {{- with $pod.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
