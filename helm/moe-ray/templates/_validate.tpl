{{/* What no schema can say: combinations. Each message names the value to change. */}}
{{- define "moe-ray.validate" -}}
{{- $v := .Values -}}
{{- $groups := include "moe-ray.workerGroups" . | fromYaml -}}
{{- $roles := dict -}}
{{- range $name, $group := $groups -}}
  {{- $_ := set $roles ($group.role | default "any") true -}}
  {{- if and $group.rayResources (or (hasKey ($group.rayStartParams | default dict) "num-cpus") (hasKey ($group.rayStartParams | default dict) "num-gpus") (hasKey ($group.rayStartParams | default dict) "memory") (hasKey ($group.rayStartParams | default dict) "resources")) -}}
    {{- fail (printf "workerGroups.%s: give resources in rayResources or in rayStartParams, not in both" $name) -}}
  {{- end -}}
  {{- if hasKey ($group.rayStartParams | default dict) "labels" -}}
    {{- fail (printf "workerGroups.%s.rayStartParams.labels: KubeRay refuses it; use workerGroups.%s.rayLabels" $name $name) -}}
  {{- end -}}
  {{- $least := int ($group.minReplicas | default 0) -}}
  {{- $start := int (dig "replicas" 1 $group | default 0) -}}
  {{- if and $group.maxReplicas (lt (int $group.maxReplicas) (max $least $start)) -}}
    {{- fail (printf "workerGroups.%s.maxReplicas: %d is below replicas (%d) or minReplicas (%d)" $name (int $group.maxReplicas) $start $least) -}}
  {{- end -}}
{{- end -}}
{{- if not (or $roles.any $roles.trunk) -}}
  {{- fail "workerGroups: none has the role trunk or any, so the trunk has no place to run" -}}
{{- end -}}
{{- if not (or $roles.any $roles.experts (eq $v.transport "local")) -}}
  {{- fail "workerGroups: none has the role experts or any, so the experts have no place to run" -}}
{{- end -}}
{{- range $number, $_ := $v.experts.overrides -}}
  {{- if ge (int $number) (int $v.model.numLocalExperts) -}}
    {{- fail (printf "experts.overrides.%s: there is no such expert; model.numLocalExperts is %d" $number (int $v.model.numLocalExperts)) -}}
  {{- end -}}
{{- end -}}
{{- if and $v.model.download.enabled (not $v.model.volume.enabled) -}}
  {{- fail "model.download: needs a volume to download to: set model.volume.enabled" -}}
{{- end -}}
{{- if and $v.model.download.enabled (not $v.model.download.repo) -}}
  {{- fail "model.download.repo: which Hugging Face repository is to be downloaded?" -}}
{{- end -}}
{{- if and $v.tls.enabled (not $v.tls.existingSecret) (not $v.tls.certManager.enabled) -}}
  {{- fail "tls.enabled: give tls.existingSecret, or set tls.certManager.enabled" -}}
{{- end -}}
{{- if eq $v.upgradeStrategy.type "NewClusterWithIncrementalUpgrade" -}}
  {{- if not $v.autoscaler.enabled -}}
    {{- fail "upgradeStrategy.type: NewClusterWithIncrementalUpgrade needs autoscaler.enabled" -}}
  {{- end -}}
  {{- if not $v.upgradeStrategy.clusterUpgradeOptions.gatewayClassName -}}
    {{- fail "upgradeStrategy.clusterUpgradeOptions.gatewayClassName: KubeRay makes a Gateway of its own for this type and must know its class" -}}
  {{- end -}}
  {{- if or $v.ingress.enabled $v.httpRoute.enabled -}}
    {{- fail "upgradeStrategy.type: with NewClusterWithIncrementalUpgrade traffic goes through the Gateway that KubeRay makes; ingress and httpRoute would bypass it, so disable them" -}}
  {{- end -}}
{{- end -}}
{{- if and (eq $v.gcsFaultTolerance.mode "redis") (not $v.gcsFaultTolerance.redis.address) -}}
  {{- fail "gcsFaultTolerance.redis.address: needed with mode redis, e.g. redis://redis:6379" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
  {{- fail "httpRoute.parentRefs: name the Gateway that the route belongs to" -}}
{{- end -}}
{{- end }}
