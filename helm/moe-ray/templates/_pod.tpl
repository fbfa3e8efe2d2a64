{{/* Flags of `ray start`. The object store has 4/5 of /dev/shm: one that does not fit there is put on a disk by Ray.
(dict "given" the values' "fixed" flags that are not theirs to set "shmSize" size of /dev/shm) */}}
{{- define "moe-ray.rayStartParams" -}}
{{- $store := mulf (include "moe-ray.bytes" .shmSize | float64) 0.8 | int64 | toString -}}
{{- toYaml (merge (dict "metrics-export-port" "8080") .fixed (.given | default dict) (dict "object-store-memory" $store)) -}}
{{- end }}

{{/* Resources of a worker group in Ray. The card's name is one of them: Ray finds it on a node that runs, the autoscaler
must be told before there is one. (dict "root" $ "group" values of the group) */}}
{{- define "moe-ray.rayResources" -}}
{{- $gpu := mergeOverwrite (deepCopy .root.Values.pod.gpu) (deepCopy (.group.gpu | default dict)) -}}
{{- $resources := deepCopy (.group.rayResources | default dict) -}}
{{- if and $gpu.count $gpu.acceleratorType -}}
  {{- $resources = merge $resources (dict (printf "accelerator_type:%s" $gpu.acceleratorType) "1") -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/* The pod template of the head and of every worker group.
(dict "root" $ "group" name "role" head|trunk|experts|any "values" what overrides .Values.pod) */}}
{{- define "moe-ray.podTemplate" -}}
{{- $root := .root -}}
{{- $pod := mergeOverwrite (deepCopy $root.Values.pod) (deepCopy .values) -}}
{{- $head := eq .role "head" -}}
{{- $labels := include "moe-ray.podSelector" $root | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/component" (ternary "head" "worker" $head) -}}
{{- $_ := set $labels "moe-ray/group" .group -}}
{{- $gpu := ternary dict ($pod.gpu | default dict) $head -}}
{{- $gpus := int ($gpu.count | default 0) -}}
metadata:
  labels: # none with the chart's version: a changed template is a new cluster
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
  {{- $match := merge (dict "moe-ray/group" .group) (include "moe-ray.podSelector" $root | fromYaml) }}
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
    {{- with $pod.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if $wait }}
    # Last, so that an init container of the values can bring the model.
    # Also on the head, where Serve builds the application: a build that does not find the model is not tried again.
    - name: wait-for-model
      image: {{ include "moe-ray.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [python, /scripts/wait_for_model.py]
      env:
        - name: MODEL
          value: {{ include "moe-ray.modelPath" $root }}
        - name: WANTED # in the Job's mark, so that neither half of a download nor another revision is served
          value: {{ include "moe-ray.downloadWanted" $root | quote }}
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
