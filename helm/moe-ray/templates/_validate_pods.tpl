{{/* Worker groups, the head, and their pods: combinations. Each message names the value to change. */}}
{{- define "moe-ray.validatePods" -}}
{{- $v := .Values -}}
{{- $ours := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "moe-ray/app" "moe-ray/group" -}}
{{- range $where, $labels := dict "commonLabels" $v.commonLabels "pod.labels" $v.pod.labels "head.labels" $v.head.labels -}}
  {{- include "moe-ray.refuseKeys" (dict "where" $where "given" $labels "refused" $ours "why" "the chart or KubeRay sets it, and selects pods by it") -}}
{{- end -}}
{{- include "moe-ray.validatePod" (dict "where" "head" "pod" (mergeOverwrite (deepCopy $v.pod) (deepCopy $v.head)) "head" true) -}}
{{- $set := list "metrics-export-port" "dashboard-agent-listen-port" "block" "address" -}}
{{- $setOnHead := concat $set (list "num-cpus" "num-gpus" "dashboard-host" "dashboard-port" "port") -}}
{{- include "moe-ray.refuseKeys" (dict "where" "head.rayStartParams" "given" $v.head.rayStartParams "refused" $setOnHead "why" "the chart or KubeRay sets it") -}}
{{- include "moe-ray.refuseKeys" (dict "where" "head.rayStartParams" "given" $v.head.rayStartParams "refused" (list "labels") "why" "KubeRay refuses it") -}}
{{- range $name, $group := include "moe-ray.workerGroups" . | fromYaml -}}
  {{- $where := printf "workerGroups.%s" $name -}}
  {{- $start := $group.rayStartParams | default dict -}}
  {{- $pod := mergeOverwrite (deepCopy $v.pod) (deepCopy $group) -}}
  {{- include "moe-ray.refuseKeys" (dict "where" (printf "%s.labels" $where) "given" $group.labels "refused" $ours "why" "the chart or KubeRay sets it, and selects pods by it") -}}
  {{- include "moe-ray.refuseKeys" (dict "where" (printf "%s.rayStartParams" $where) "given" $start "refused" $set "why" "the chart or KubeRay sets it") -}}
  {{- include "moe-ray.refuseKeys" (dict "where" (printf "%s.rayStartParams" $where) "given" $start "refused" (list "labels") "why" (printf "KubeRay refuses it; use %s.rayLabels" $where)) -}}
  {{- include "moe-ray.refuseKeys" (dict "where" (printf "%s.rayLabels" $where) "given" $group.rayLabels "refused" (list "moe-ray/role" "moe-ray/group") "why" "the chart sets it, from role and name of the group") -}}
  {{- range $flag := list "num-cpus" "num-gpus" "memory" "resources" -}}
    {{- if and (hasKey $start $flag) (include "moe-ray.rayResources" (dict "root" $ "group" $group) | fromYaml) -}}
      {{- fail (printf "%s: give resources in rayResources (to which gpu.acceleratorType adds) or in rayStartParams (%s), not in both" $where $flag) -}}
    {{- end -}}
  {{- end -}}
  {{- include "moe-ray.validatePod" (dict "where" $where "pod" $pod "head" false) -}}
  {{- $replicas := int (dig "replicas" 1 $group) -}}
  {{- $least := int (dig "minReplicas" $replicas $group) -}}
  {{- $most := int (dig "maxReplicas" $replicas $group) -}}
  {{- if lt $most (max $least $replicas) -}}
    {{- fail (printf "%s.maxReplicas: %d is below replicas (%d) or minReplicas (%d)" $where $most $replicas $least) -}}
  {{- end -}}
{{- end -}}
{{- if $v.autoscaler.enabled -}}
  {{- include "moe-ray.validateCard" (dict "root" . "where" "trunk" "role" "trunk" "card" $v.trunk.acceleratorType) -}}
  {{- if ne $v.transport "local" -}}
    {{- include "moe-ray.validateCard" (dict "root" . "where" "experts" "role" "experts" "card" $v.experts.acceleratorType) -}}
    {{- range $number, $override := $v.experts.overrides -}}
      {{- include "moe-ray.validateCard" (dict "root" $ "where" (printf "experts.overrides.%s" $number) "role" "experts" "card" $override.acceleratorType) -}}
    {{- end -}}
    {{- range $number, $spare := $v.experts.spares -}}
      {{- include "moe-ray.validateCard" (dict "root" $ "where" (printf "experts.spares.%d" $number) "role" "experts" "card" $spare.acceleratorType) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* (dict "where" path "given" map "refused" keys "why" text) */}}
{{- define "moe-ray.refuseKeys" -}}
{{- $given := .given | default dict -}}
{{- range $key := .refused -}}
  {{- if hasKey $given $key -}}{{- fail (printf "%s.%s: %s" $.where $key $.why) -}}{{- end -}}
{{- end -}}
{{- end }}

{{/* Sizes and GPUs of one kind of pod. (dict "where" path "pod" values, those of `pod` included "head" bool) */}}
{{- define "moe-ray.validatePod" -}}
{{- $pod := .pod -}}
{{- $gpus := ternary 0 (int $pod.gpu.count) .head -}}
{{- $limits := $pod.resources.limits | default dict -}}
{{- range $kind := list "requests" "limits" -}}
  {{- $given := get (get $pod.resources $kind | default dict) $pod.gpu.resource -}}
  {{- if and $given (ne (toString $given) (toString $gpus)) -}}
    {{- fail (printf "%s.resources.%s: says %v of %s, and gpu.count says %d%s; give GPUs in gpu.count only, which sees to tolerations, too" $.where $kind $given $pod.gpu.resource $gpus (ternary " (the head has none)" "" $.head)) -}}
  {{- end -}}
{{- end -}}
{{- $shm := include "moe-ray.bytes" $pod.shmSize | int64 -}}
{{- $store := get ($pod.rayStartParams | default dict) "object-store-memory" -}}
{{- if and $store (not (regexMatch "^[0-9]+$" $store)) -}}
  {{- fail (printf "%s.rayStartParams.object-store-memory: must be a number of bytes, not %q" .where $store) -}}
{{- end -}}
{{- if gt (int64 ($store | default "0")) $shm -}}
  {{- fail (printf "%s.rayStartParams.object-store-memory: %s bytes do not fit in /dev/shm, whose shmSize is %s, so Ray would put its object store on a disk; raise %s.shmSize or leave the flag out" .where $store $pod.shmSize .where) -}}
{{- end -}}
{{- if lt $shm 104857600 -}}
  {{- fail (printf "%s.shmSize: %s is too small: Ray's object store takes 4/5 of it, and at least 75Mi; give 100Mi or more" .where $pod.shmSize) -}}
{{- end -}}
{{- $memory := include "moe-ray.bytes" ($limits.memory | default 0) | int64 -}}
{{- if and $memory (ge $shm $memory) -}}
  {{- fail (printf "%s.shmSize: %s counts as memory of the pod, whose resources.limits.memory is %v; make it smaller" .where $pod.shmSize $limits.memory) -}}
{{- end -}}
{{- end }}

{{/* An actor that asks for a card which no group has in Ray's eyes: the autoscaler would never add a pod for it.
(dict "root" $ "where" path "role" trunk|experts "card" Ray's name or null) */}}
{{- define "moe-ray.validateCard" -}}
{{- if .card -}}
{{- $resource := printf "accelerator_type:%s" .card -}}
{{- $found := false -}}
{{- range $_, $group := include "moe-ray.workerGroups" .root | fromYaml -}}
  {{- if has ($group.role | default "any") (list $.role "any") -}}
    {{- $has := include "moe-ray.rayResources" (dict "root" $.root "group" $group) | fromYaml -}}
    {{- if or (hasKey $has $resource) (contains $resource (dig "rayStartParams" "resources" "" $group)) -}}{{- $found = true -}}{{- end -}}
  {{- end -}}
{{- end -}}
{{- if not $found -}}
  {{- fail (printf "%s.acceleratorType: no worker group for %s says that it has the card %s, so the autoscaler would never add a pod for it; set gpu.acceleratorType %s in a group with GPUs, or leave %s.acceleratorType out (the role already selects the group)" .where .role .card .card .where) -}}
{{- end -}}
{{- end -}}
{{- end }}
