{{/* Copies a section of the values into one of moe_ray.config: camelCase keys become snake_case, what is null is left to
moe_ray's own default. Keys of the maps listed in "free" are names, not keys, and stay. (dict "from" map "to" dict) */}}
{{- define "moe-ray.copySection" -}}
{{- $free := list "labels" "resources" "modules" -}}
{{- $to := .to -}}
{{- range $key, $value := .from -}}
  {{- if kindIs "map" $value -}}
    {{- if has $key $free -}}
      {{- if $value -}}{{- $_ := set $to $key (deepCopy $value) -}}{{- end -}}
    {{- else -}}
      {{- $inner := dict -}}
      {{- include "moe-ray.copySection" (dict "from" $value "to" $inner) -}}
      {{- if $inner -}}{{- $_ := set $to (snakecase $key) $inner -}}{{- end -}}
    {{- end -}}
  {{- else if not (kindIs "invalid" $value) -}}
    {{- $_ := set $to (snakecase $key) $value -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* The label selector that sends actors of a role to its worker groups; nothing where all groups take any.
(dict "root" $ "role" trunk|experts) */}}
{{- define "moe-ray.roleSelector" -}}
{{- $role := .role -}}
{{- $own := false -}}
{{- $any := false -}}
{{- range $_, $group := include "moe-ray.workerGroups" .root | fromYaml -}}
  {{- if eq ($group.role | default "any") $role -}}{{- $own = true -}}{{- end -}}
  {{- if eq ($group.role | default "any") "any" -}}{{- $any = true -}}{{- end -}}
{{- end -}}
{{- if and $own $any -}}in({{ $role }},any)
{{- else if $own -}}{{ $role }}
{{- else -}}any
{{- end -}}
{{- end }}

{{/* The tree of moe_ray.config.Config. Numbers of replicas are not in it: a change in `args` restarts every actor, one in
`deployments` only adds or removes replicas. */}}
{{- define "moe-ray.args" -}}
{{- $v := .Values -}}
{{- $args := dict "transport" $v.transport "log_level" $v.logLevel "cache_dir" (printf "%s/moe-ray" $v.cache.mountPath) -}}
{{- with $v.logFormat -}}{{- $_ := set $args "log_format" . -}}{{- end -}}

{{- $model := dict -}}
{{- include "moe-ray.copySection" (dict "from" (omit $v.model "path" "numLocalExperts" "volume" "download" "waitForFiles" "nativeLibraries") "to" $model) -}}
{{- $_ := set $model "path" (include "moe-ray.modelPath" .) -}}
{{- if $v.model.download.enabled -}}
  {{- $_ := unset $model "revision" -}}
  {{- /* The directory's name says the revision, too: clients must not have to. */ -}}
  {{- $_ := set $model "served_name" ($v.model.servedName | default (include "moe-ray.downloadName" .)) -}}
{{- end -}}
{{- $_ := set $args "model" $model -}}

{{- $engine := dict -}}
{{- include "moe-ray.copySection" (dict "from" $v.engine "to" $engine) -}}
{{- if $engine -}}{{- $_ := set $args "engine" $engine -}}{{- end -}}

{{- $trunk := dict -}}
{{- include "moe-ray.copySection" (dict "from" (omit $v.trunk "numReplicas" "minReplicas" "maxReplicas") "to" $trunk) -}}
{{- if $v.trunk.autoscale.enabled -}}
  {{- /* Said in the entry of `deployments`, too, which must not depend on a default that may change. */ -}}
  {{- $_ := set $trunk "max_replicas" ($v.trunk.maxReplicasByHand | default 16) -}}
  {{- $_ := set $engine "max_num_seqs" ($engine.max_num_seqs | default 64) -}}
  {{- $_ := set $args "engine" $engine -}}
{{- else -}}
  {{- $_ := unset $trunk "autoscale" -}}
{{- end -}}
{{- $_ := set $trunk "labels" (merge (deepCopy ($v.trunk.labels | default dict)) (dict "moe-ray/role" (include "moe-ray.roleSelector" (dict "root" . "role" "trunk")))) -}}
{{- $_ := set $args "trunk" $trunk -}}

{{- $experts := dict -}}
{{- include "moe-ray.copySection" (dict "from" (omit $v.experts "numReplicas" "minReplicas" "maxReplicas" "overrides" "spares") "to" $experts) -}}
{{- $role := dict "moe-ray/role" (include "moe-ray.roleSelector" (dict "root" . "role" "experts")) -}}
{{- if ne $v.transport "local" -}}
  {{- $_ := set $experts "labels" (merge (deepCopy ($v.experts.labels | default dict)) $role) -}}
{{- end -}}
{{- $overrides := dict -}}
{{- range $number, $override := $v.experts.overrides -}}
  {{- $one := dict -}}
  {{- include "moe-ray.copySection" (dict "from" (omit $override "numReplicas" "minReplicas" "maxReplicas") "to" $one) -}}
  {{- if $one.labels -}}{{- $_ := set $one "labels" (merge $one.labels $experts.labels) -}}{{- end -}}
  {{- if $one -}}{{- $_ := set $overrides $number $one -}}{{- end -}}
{{- end -}}
{{- if $overrides -}}{{- $_ := set $experts "overrides" $overrides -}}{{- end -}}
{{- $spares := list -}}
{{- range $spare := $v.experts.spares -}}
  {{- $one := dict -}}
  {{- include "moe-ray.copySection" (dict "from" (omit $spare "numReplicas" "experts") "to" $one) -}}
  {{- $_ := set $one "experts" $spare.experts -}}
  {{- if $one.labels -}}{{- $_ := set $one "labels" (merge $one.labels $role) -}}{{- end -}}
  {{- $spares = append $spares $one -}}
{{- end -}}
{{- if $spares -}}{{- $_ := set $experts "spares" $spares -}}{{- end -}}
{{- if $v.experts.autoscale.enabled -}}
  {{- $_ := set $experts "max_replicas" ($v.experts.maxReplicasByHand | default 64) -}}
{{- else -}}
  {{- $_ := unset $experts "autoscale" -}}
{{- end -}}
{{- if $experts -}}{{- $_ := set $args "experts" $experts -}}{{- end -}}

{{- $gateway := dict -}}
{{- include "moe-ray.copySection" (dict "from" (omit $v.gateway "numReplicas") "to" $gateway) -}}
{{- if $gateway -}}{{- $_ := set $args "gateway" $gateway -}}{{- end -}}

{{- $adapters := dict -}}
{{- include "moe-ray.copySection" (dict "from" $v.adapters "to" $adapters) -}}
{{- if $adapters -}}{{- $_ := set $args "adapters" $adapters -}}{{- end -}}

{{- $variants := list -}}
{{- range $variant := $v.variants -}}
  {{- $one := dict -}}
  {{- include "moe-ray.copySection" (dict "from" (omit $variant "numTrunks") "to" $one) -}}
  {{- $variants = append $variants $one -}}
{{- end -}}
{{- if $variants -}}{{- $_ := set $args "variants" $variants -}}{{- end -}}

{{- $tracing := dict -}}
{{- include "moe-ray.copySection" (dict "from" $v.tracing "to" $tracing) -}}
{{- if $tracing -}}{{- $_ := set $args "tracing" $tracing -}}{{- end -}}

{{- with $v.tls -}}
{{- if .enabled -}}
  {{- $tls := dict "certificate" (printf "%s/tls.crt" .mountPath) "key" (printf "%s/tls.key" .mountPath) "ca" (printf "%s/ca.crt" .mountPath) -}}
  {{- if .serverName -}}{{- $_ := set $tls "server_name" .serverName -}}{{- end -}}
  {{- $_ := set $args "tls" $tls -}}
{{- end -}}
{{- end -}}
{{- toYaml (mergeOverwrite $args (deepCopy $v.extraConfig)) -}}
{{- end }}

{{/* An entry of `deployments` that says how many replicas there are, and nothing else. Without autoscaling that is a number.
With it, the entry replaces the whole autoscaling_config that the application builds, its policy too, so it says all of
it. The policy's own bounds are wide and never change: Serve takes a changed policy for changed code, and restarts every
actor; its own bounds it merely applies.
(dict "name" deployment "where" key of the values "numbers" numReplicas, minReplicas, maxReplicas "scale" autoscale
section of the args or {} "ceiling" most replicas "policy" class "kwargs" its own arguments) */}}
{{- define "moe-ray.replicas" -}}
{{- $least := int (.numbers.minReplicas | default 1) -}}
{{- $start := max $least (int (.numbers.numReplicas | default 1)) -}}
{{- $most := int (.numbers.maxReplicas | default $start) -}}
{{- if lt $most $start -}}
  {{- fail (printf "%s: maxReplicas of %s is %d, below the %d that it starts with (numReplicas, minReplicas)" .where .name $most $start) -}}
{{- end -}}
{{- if .scale.enabled -}}
  {{- if gt $most (int .ceiling) -}}
    {{- fail (printf "%s: maxReplicas of %s is %d, above %s.maxReplicasByHand (%d)" .where .name $most .where (int .ceiling)) -}}
  {{- end -}}
  {{- $kwargs := merge (dict "min_replicas" 1 "max_replicas" (int .ceiling)) .kwargs -}}
  {{- $policy := dict "policy_function" (printf "moe_ray.deploy.policies.%s" .policy) "policy_kwargs" $kwargs -}}
  {{- $config := dict "min_replicas" $least "initial_replicas" $start "max_replicas" $most "upscale_delay_s" 0 "downscale_delay_s" 0 -}}
  {{- $_ := set $config "metrics_interval_s" .scale.interval_s -}}
  {{- $_ := set $config "look_back_period_s" .scale.look_back_s -}}
  {{- $_ := set $config "policy" $policy -}}
  {{- dict "name" .name "autoscaling_config" $config | toYaml -}}
{{- else -}}
  {{- /* null: else a policy that the application builds would go on deciding. */ -}}
  {{- dict "name" .name "num_replicas" $start "autoscaling_config" nil | toYaml -}}
{{- end -}}
{{- end }}

{{/* The trunk's entry, or that of a variant's. (dict "root" $ "args" the args "variant" one of the values or nothing) */}}
{{- define "moe-ray.trunkDeployment" -}}
{{- $variant := .variant | default dict -}}
{{- $scale := dig "trunk" "autoscale" dict .args -}}
{{- $options := merge (dict "max_num_seqs" (dig "engine" "max_num_seqs" 64 .args)) (pick $scale "target_kv_use" "target_waiting" "up_after_s" "down_after_s") -}}
{{- $kwargs := dict "options" $options -}}
{{- $name := "Trunk" -}}
{{- if $variant -}}
  {{- $name = printf "Trunk-%s" $variant.name -}}
  {{- $_ := set $kwargs "unit" $name -}}
{{- end -}}
{{- $numbers := pick .root.Values.trunk "numReplicas" "minReplicas" "maxReplicas" -}}
{{- with $variant.numTrunks -}}{{- $_ := set $numbers "numReplicas" . -}}{{- end -}}
{{- include "moe-ray.replicas" (dict "name" $name "where" "trunk" "numbers" $numbers "scale" $scale "ceiling" (dig "trunk" "max_replicas" 16 .args) "policy" "TrunkPolicy" "kwargs" $kwargs) -}}
{{- end }}

{{/* One entry for each expert, or each group of experts that share an actor, then the spares.
(dict "root" $ "args" the args) */}}
{{- define "moe-ray.expertDeployments" -}}
{{- $v := .root.Values -}}
{{- $experts := .args.experts | default dict -}}
{{- $scale := $experts.autoscale | default dict -}}
{{- $options := merge (dict "max_total" (dig "max_total_replicas" nil $scale)) (pick $scale "target_busy" "up_after_s" "down_after_s") -}}
{{- $count := int $v.model.numLocalExperts -}}
{{- $asked := $experts.experts_per_actor | default "auto" -}}
{{- $each := int (ternary (div (add $count 15) 16) $asked (eq (toString $asked) "auto")) -}}
{{- $shared := pick $v.experts "numReplicas" "minReplicas" "maxReplicas" -}}
{{- $entries := list -}}
{{- range $first := untilStep 0 $count $each -}}
  {{- $last := sub (min (add $first $each) $count) 1 -}}
  {{- $name := ternary (printf "Expert%d" $first) (printf "Experts%d-%d" $first $last) (eq (int $first) (int $last)) -}}
  {{- $mine := dict -}}
  {{- $said := "" -}}
  {{- range $number := untilStep (int $first) (int (add $last 1)) 1 -}}
    {{- $own := pick (get $v.experts.overrides (toString $number) | default dict) "numReplicas" "minReplicas" "maxReplicas" -}}
    {{- if $own -}}
      {{- if and $said (ne (toJson $own) (toJson $mine)) -}}
        {{- fail (printf "experts.overrides.%s and experts.overrides.%d differ in their numbers of replicas, but these experts share an actor (experts.expertsPerActor is %d)" $said $number $each) -}}
      {{- end -}}
      {{- $mine = $own -}}
      {{- $said = toString $number -}}
    {{- end -}}
  {{- end -}}
  {{- $numbers := mergeOverwrite (deepCopy $shared) $mine -}}
  {{- $kwargs := dict "expert" (int $first) "options" $options -}}
  {{- $entry := include "moe-ray.replicas" (dict "name" $name "where" "experts" "numbers" $numbers "scale" $scale "ceiling" ($experts.max_replicas | default 64) "policy" "ExpertPolicy" "kwargs" $kwargs) -}}
  {{- $entries = append $entries (fromYaml $entry) -}}
{{- end -}}
{{- range $number, $spare := $v.experts.spares -}}
  {{- $entries = append $entries (dict "name" (printf "Spare%d" $number) "num_replicas" (int ($spare.numReplicas | default 1))) -}}
{{- end -}}
{{- toYaml $entries -}}
{{- end }}

{{/* The whole Serve config file. */}}
{{- define "moe-ray.serveConfig" -}}
{{- $v := .Values -}}
{{- $args := include "moe-ray.args" . | fromYaml -}}
{{- $deployments := list (dict "name" "Gateway" "num_replicas" (int $v.gateway.numReplicas)) (include "moe-ray.trunkDeployment" (dict "root" . "args" $args) | fromYaml) -}}
{{- range $variant := $v.variants -}}
  {{- $deployments = append $deployments (include "moe-ray.trunkDeployment" (dict "root" $ "args" $args "variant" $variant) | fromYaml) -}}
{{- end -}}
{{- if ne $args.transport "local" -}}
  {{- $deployments = concat $deployments (include "moe-ray.expertDeployments" (dict "root" . "args" $args) | fromYamlArray) -}}
{{- end -}}
{{- $application := dict "name" "moe-ray" "route_prefix" "/" "import_path" "moe_ray.deploy.app:build" "args" $args "deployments" $deployments -}}
{{- with $v.serve.runtimeEnv -}}{{- $_ := set $application "runtime_env" . -}}{{- end -}}
{{- $http := merge (deepCopy $v.serve.httpOptions) (dict "host" "0.0.0.0" "port" $v.serve.port) -}}
{{- $config := dict "proxy_location" $v.serve.proxyLocation "http_options" $http "applications" (list $application) -}}
{{- with $v.serve.loggingConfig -}}{{- $_ := set $config "logging_config" . -}}{{- end -}}
{{- toYaml $config -}}
{{- end }}
