{{/* Last part of the repo id: name of the directory, and of the model for clients. */}}
{{- define "moe-ray.downloadName" -}}
{{- base .Values.model.download.repo -}}
{{- end }}

{{/* Directory of the model on the volume. Another revision, or another conversion, has another one: actors that run go on
reading theirs, and new ones, whose pods name the new one, wait for it. */}}
{{- define "moe-ray.downloadDirectory" -}}
{{- $download := .Values.model.download -}}
{{- $name := include "moe-ray.downloadDense" . -}}
{{- if $download.convert -}}
  {{- $name = printf "%s-%s-%s" $name $download.convert (include "moe-ray.convertOptions" . | sha256sum | trunc 8) -}}
{{- end -}}
{{- printf "%s/%s" .Values.model.volume.mountPath ($download.directory | default $name) -}}
{{- end }}

{{/* Default name of what is downloaded, before any conversion. */}}
{{- define "moe-ray.downloadDense" -}}
{{- $revision := .Values.model.download.revision -}}
{{- if not (regexMatch "^[A-Za-z0-9._-]{0,40}$" $revision) -}}
  {{- $revision = sha256sum $revision | trunc 12 -}}
{{- end -}}
{{- include "moe-ray.downloadName" . -}}{{- with $revision -}}-{{ . }}{{- end -}}
{{- end }}

{{/* Options of the conversion, one string; nothing where there is none. */}}
{{- define "moe-ray.convertOptions" -}}
{{- $download := .Values.model.download -}}
{{- if eq $download.convert "upcycle" -}}
{{- with $download.upcycle -}}
experts={{ int $.Values.model.numLocalExperts }} top_k={{ int .topK }} noise={{ .noise }} seed={{ int64 .seed }} dtype={{ .dtype }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What the Job's mark must say: which model the directory holds, all of it. Nothing where there is no Job. */}}
{{- define "moe-ray.downloadWanted" -}}
{{- $download := .Values.model.download -}}
{{- if $download.enabled -}}
{{ $download.repo }}@{{ $download.revision | default "main" }}
{{- if $download.convert }} {{ $download.convert }} {{ include "moe-ray.convertOptions" . }}{{- end -}}
{{- end -}}
{{- end }}

{{/* What --model would say: a directory on the volume where the Job downloads it, else `model.path`. */}}
{{- define "moe-ray.modelPath" -}}
{{- if .Values.model.download.enabled -}}
{{- include "moe-ray.downloadDirectory" . -}}
{{- else -}}
{{- .Values.model.path -}}
{{- end -}}
{{- end }}

{{/* Pod of the download Job. */}}
{{- define "moe-ray.downloadPod" -}}
{{- $download := .Values.model.download -}}
metadata:
  labels: # not those that Services, budgets and policies of the serving pods select
    app.kubernetes.io/name: {{ include "moe-ray.chartName" . }}-download
    app.kubernetes.io/instance: {{ .Release.Name }}
    app.kubernetes.io/component: download
spec:
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {{- toYaml .Values.pod.podSecurityContext | nindent 4 }}
  {{- with $download.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $download.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: download
      image: {{ include "moe-ray.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [python, -u, /scripts/download.py]
      env:
        {{- include "moe-ray.env" . | nindent 8 }}
        - name: HF_HUB_DISABLE_PROGRESS_BARS # which are no lines; the script prints its own
          value: "1"
        - name: REPO
          value: {{ $download.repo }}
        - name: REVISION
          value: {{ $download.revision | quote }}
        - name: DIRECTORY
          value: {{ include "moe-ray.downloadDirectory" . }}
        - name: WANTED
          value: {{ include "moe-ray.downloadWanted" . | quote }}
        {{- if $download.convert }}
        - name: CONVERT
          value: {{ include "moe-ray.convertOptions" . | quote }}
        - name: SOURCE # what is converted
          value: {{ .Values.model.volume.mountPath }}/{{ $download.directory | default (include "moe-ray.downloadDense" .) }}-dense
        {{- end }}
        {{- with $download.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources: {{- toYaml $download.resources | nindent 8 }}
      securityContext: {{- toYaml .Values.pod.securityContext | nindent 8 }}
      volumeMounts:
        - name: scripts
          mountPath: /scripts
          readOnly: true
        {{- include "moe-ray.volumeMounts" (dict "root" . "readOnly" false) | nindent 8 }}
  volumes:
    - name: scripts
      configMap:
        name: {{ include "moe-ray.fullname" . }}-scripts
    {{- include "moe-ray.volumes" . | nindent 4 }}
{{- end }}
