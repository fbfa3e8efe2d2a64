{{/* What no schema can say: combinations. Each message names the value to change. */}}
{{- define "moe-ray.validate" -}}
{{- $v := .Values -}}
{{- $groups := include "moe-ray.workerGroups" . | fromYaml -}}
{{- $roles := dict -}}
{{- range $name, $group := $groups -}}
  {{- $_ := set $roles ($group.role | default "any") true -}}
{{- end -}}
{{- include "moe-ray.validatePods" . -}}
{{- include "moe-ray.validateActors" . -}}
{{- include "moe-ray.validateUpgrades" . -}}
{{- if not (or $roles.any $roles.trunk) -}}
  {{- fail "workerGroups: none has the role trunk or any, so the trunk has no place to run" -}}
{{- end -}}
{{- if not (or $roles.any $roles.experts (eq $v.transport "local")) -}}
  {{- fail "workerGroups: none has the role experts or any, so the experts have no place to run" -}}
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
{{- if and (eq $v.gcsFaultTolerance.mode "redis") (not $v.gcsFaultTolerance.redis.address) -}}
  {{- fail "gcsFaultTolerance.redis.address: needed with mode redis, e.g. redis://redis:6379" -}}
{{- end -}}
{{- if and $v.tls.enabled $v.tls.certManager.enabled (not $v.tls.existingSecret) (not $v.tls.certManager.issuerRef.name) -}}
  {{- fail "tls.certManager.issuerRef.name: which issuer is to sign the certificate?" -}}
{{- end -}}
{{- with $v.monitoring.podMonitor -}}
{{- if and .enabled .gateway (gt (int $v.gateway.numReplicas) 1) -}}
  {{- fail (printf "monitoring.podMonitor.gateway: a scrape reaches one gateway, the next one another, and gateway.numReplicas is %d: rename what Ray exports instead (monitoring.podMonitor.metricRelabelings)" (int $v.gateway.numReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
  {{- fail "ingress.hosts: name at least one host; without one the Ingress has no rule" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
  {{- fail "httpRoute.parentRefs: name the Gateway that the route belongs to" -}}
{{- end -}}
{{- end }}

{{/* What the actors are told: checks that moe_ray makes when it builds the application, made before anything is changed. */}}
{{- define "moe-ray.validateActors" -}}
{{- $v := .Values -}}
{{- range $number, $_ := $v.experts.overrides -}}
  {{- if ge (int $number) (int $v.model.numLocalExperts) -}}
    {{- fail (printf "experts.overrides.%s: there is no such expert; model.numLocalExperts is %d" $number (int $v.model.numLocalExperts)) -}}
  {{- end -}}
{{- end -}}
{{- range $section := list "trunk" "experts" -}}
  {{- $one := get $v $section -}}
  {{- if $one.autoscale.enabled -}}
    {{- if lt ($one.autoscale.lookBackS | float64) (mulf 2 $one.autoscale.intervalS) -}}
      {{- fail (printf "%s.autoscale.lookBackS: %v must be at least twice %s.autoscale.intervalS (%v)" $section $one.autoscale.lookBackS $section $one.autoscale.intervalS) -}}
    {{- end -}}
    {{- $grows := eq (include "moe-ray.grows" $one) "yes" -}}
    {{- range $_, $override := $one.overrides | default dict -}}
      {{- if include "moe-ray.grows" (mergeOverwrite (pick $one "numReplicas" "minReplicas" "maxReplicas") (pick ($override | default dict) "numReplicas" "minReplicas" "maxReplicas")) -}}{{- $grows = true -}}{{- end -}}
    {{- end -}}
    {{- if not $grows -}}
      {{- fail (printf "%s.autoscale.enabled: nothing could grow: needs %s.maxReplicas%s above minReplicas" $section $section (ternary " (or that of an override)" "" (eq $section "experts"))) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $drafts := has ($v.engine.speculative | default "off") (list "draft" "auto") -}}
{{- if and $v.engine.draftModel (not $drafts) -}}
  {{- fail "engine.draftModel: engine.speculative must be draft or auto" -}}
{{- end -}}
{{- if and (eq ($v.engine.speculative | default "off") "draft") (not $v.engine.draftModel) -}}
  {{- fail "engine.speculative: draft needs engine.draftModel" -}}
{{- end -}}
{{- if and $v.engine.draftQuantize (not $v.engine.draftModel) -}}
  {{- fail "engine.draftQuantize: there is no engine.draftModel" -}}
{{- end -}}
{{- $longest := int ($v.engine.promptLookupMax | default 4) -}}
{{- $shortest := int ($v.engine.promptLookupMin | default 2) -}}
{{- if gt $shortest $longest -}}
  {{- fail (printf "engine.promptLookupMin: %d must be at most engine.promptLookupMax (%d)" $shortest $longest) -}}
{{- end -}}
{{- end }}

{{/* "yes" where the bounds leave autoscaling something to do. */}}
{{- define "moe-ray.grows" -}}
{{- $least := int (.minReplicas | default 1) -}}
{{- $start := max $least (int (.numReplicas | default 1)) -}}
{{- if gt (int (.maxReplicas | default $start)) $least -}}yes{{- end -}}
{{- end }}

{{/* Upgrades and time limits. */}}
{{- define "moe-ray.validateUpgrades" -}}
{{- $v := .Values -}}
{{- if include "moe-ray.incremental" . -}}
  {{- $options := $v.upgradeStrategy.clusterUpgradeOptions -}}
  {{- if not $v.autoscaler.enabled -}}
    {{- fail "upgradeStrategy.type: NewClusterWithIncrementalUpgrade needs autoscaler.enabled" -}}
  {{- end -}}
  {{- if not $options.gatewayClassName -}}
    {{- fail "upgradeStrategy.clusterUpgradeOptions.gatewayClassName: KubeRay makes a Gateway of its own for this type and must know its class" -}}
  {{- end -}}
  {{- if gt (int $options.stepSizePercent) (int $options.maxSurgePercent) -}}
    {{- fail (printf "upgradeStrategy.clusterUpgradeOptions.stepSizePercent: %d must be at most maxSurgePercent (%d)" (int $options.stepSizePercent) (int $options.maxSurgePercent)) -}}
  {{- end -}}
  {{- if or $v.ingress.enabled $v.httpRoute.enabled -}}
    {{- fail "upgradeStrategy.type: with NewClusterWithIncrementalUpgrade traffic goes through the Gateway that KubeRay makes; ingress and httpRoute would bypass it, so disable them" -}}
  {{- end -}}
  {{- range $key, $value := $v.service -}}
    {{- if and $value (not (and (eq $key "type") (eq (toString $value) "ClusterIP"))) -}}
      {{- fail (printf "service.%s: with upgradeStrategy.type NewClusterWithIncrementalUpgrade KubeRay makes a Service of its own for each cluster and takes nothing from service; clients go to the Gateway %s-gateway, so leave service.%s as it is by default" $key (include "moe-ray.fullname" $) $key) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $timeout := $v.rayService.initializingTimeout -}}
{{- $duration := regexMatch "^(([0-9]+(\\.[0-9]+)?(ns|us|µs|ms|s|m|h))+|[0-9]+)$" $timeout -}}
{{- if and $timeout (not (and $duration (regexMatch "[1-9]" $timeout))) -}}
  {{- fail (printf "rayService.initializingTimeout: %q is neither a duration above 0, such as 90m or 1h30m, nor a number of seconds" $timeout) -}}
{{- end -}}
{{- if and (eq $v.gcsFaultTolerance.mode "rocksdb") $v.gcsFaultTolerance.rocksdb.claimName (ne $v.upgradeStrategy.type "None") -}}
  {{- fail (printf "gcsFaultTolerance.rocksdb.claimName: in an upgrade of type %s the heads of two clusters would write to this one store; leave it empty, and KubeRay makes a claim for each cluster, or set upgradeStrategy.type None" $v.upgradeStrategy.type) -}}
{{- end -}}
{{- end }}
