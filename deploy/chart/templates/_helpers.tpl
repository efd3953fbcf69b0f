{{- define "shoehorn.name" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "shoehorn.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Number of replicas that may exist: the front knows all of them, and HAProxy finds those that run. */}}
{{- define "shoehorn.maxReplicas" -}}
{{- if .Values.autoscaling.enabled }}{{ .Values.autoscaling.maxReplicas }}{{ else }}{{ .Values.replicas }}{{ end -}}
{{- end }}

{{/* Addresses of the replicas. Both a StatefulSet and a LeaderWorkerSet name the pod NAME-0, NAME-1, ... */}}
{{- define "shoehorn.addresses" -}}
{{- $domain := printf "%s-replica.%s.svc.%s" (include "shoehorn.name" .) .Release.Namespace .Values.clusterDomain -}}
{{- range $index := until (include "shoehorn.maxReplicas" . | int) }}
{{- if $index }},{{ end }}{{ include "shoehorn.name" $ }}-replica-{{ $index }}.{{ $domain }}
{{- end -}}
{{- end }}

{{- define "shoehorn.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 0
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "shoehorn.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Settings of every container. RUN_DIR is a folder below the volume, so that its mode can be 0700. */}}
{{- define "shoehorn.environment" -}}
- {name: MODEL_ID, value: {{ .Values.model.id | quote }}}
- {name: MODEL_SOURCE, value: {{ .Values.model.source | quote }}}
{{- with .Values.model.servedName }}
- {name: SERVED_MODEL_NAME, value: {{ . | quote }}}
{{- end }}
- {name: RUN_DIR, value: /run/shoehorn/run}
- {name: DRAIN_TIMEOUT, value: {{ .Values.drainTimeout | quote }}}
{{- range $name, $value := .Values.settings }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* Keys and TLS, where clients connect. */}}
{{- define "shoehorn.publicEnvironment" -}}
{{- if .Values.secrets.apiKeys.name }}
- {name: API_KEYS_FILE, value: /run/secrets/api-keys/keys}
{{- end }}
{{- if .Values.secrets.tls.name }}
- {name: TLS_CERT_FILE, value: /run/secrets/tls/tls.crt}
- {name: TLS_KEY_FILE, value: /run/secrets/tls/tls.key}
{{- end }}
{{- end }}

{{- define "shoehorn.hubEnvironment" -}}
{{- if .Values.secrets.hfToken.name }}
- {name: HF_TOKEN_FILE, value: /run/secrets/hf/token}
{{- end }}
{{- if .Values.secrets.modelscopeToken.name }}
- {name: MODELSCOPE_API_TOKEN_FILE, value: /run/secrets/modelscope/token}
{{- end }}
{{- end }}

{{- define "shoehorn.clusterSecret" -}}
- {name: CLUSTER_SECRET_FILE, value: /run/secrets/cluster/secret}
{{- end }}

{{- define "shoehorn.probes" -}}
{{- $scheme := .scheme -}}
startupProbe:
  httpGet: {path: /livez, port: http, scheme: {{ $scheme }}}
  periodSeconds: 5
  failureThreshold: 60
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /livez, port: http, scheme: {{ $scheme }}}
  periodSeconds: 10
  failureThreshold: 6
  timeoutSeconds: 5
readinessProbe:
  httpGet: {path: /readyz, port: http, scheme: {{ $scheme }}}
  periodSeconds: 5
  failureThreshold: 2
  timeoutSeconds: 5
{{- end }}

{{- define "shoehorn.writableMounts" -}}
- {name: run, mountPath: /run/shoehorn}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/shoehorn}
{{- end }}

{{- define "shoehorn.writableVolumes" -}}
- {name: run, emptyDir: {medium: Memory, sizeLimit: 64Mi}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
{{- end }}

{{/* A mounted Secret: `mount` and `volume` of one key under a fixed file name, readable for the pod's group only. */}}
{{- define "shoehorn.secretVolume" -}}
- name: {{ .volume }}
  secret:
    secretName: {{ .secret.name | quote }}
    defaultMode: 0440
    items: [{key: {{ .secret.key | quote }}, path: {{ .file }}}]
{{- end }}

{{- define "shoehorn.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.topologySpreadConstraints }}
topologySpreadConstraints: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Claim of one pod for models. */}}
{{- define "shoehorn.claim" -}}
- metadata: {name: {{ .name }}}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .storage.className }}
    storageClassName: {{ . | quote }}
    {{- end }}
    resources: {requests: {storage: {{ .storage.size }}}}
{{- end }}

{{/* The pod of a replica. Arguments: root, role (single, head, worker). */}}
{{- define "shoehorn.pod" -}}
{{- $values := .root.Values -}}
{{- $isGroup := ne .role "single" -}}
{{- $hasFront := $values.front.enabled -}}
{{- $isPublic := and (not $hasFront) (ne .role "worker") -}}
{{- $usesSecret := or $hasFront $isGroup -}}
metadata:
  labels:
    {{- include "shoehorn.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ ternary "node" "replica" (eq .role "worker") }}
  {{- with $values.podAnnotations }}
  annotations: {{ toYaml . | nindent 4 }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $values.drainTimeout 60 }}
  securityContext:
    {{- include "shoehorn.podSecurity" .root | nindent 4 }}
    {{- if $isGroup }}
    sysctls: [{name: net.ipv4.ip_local_port_range, value: "40000 40999"}] # a safe sysctl; the ports of NCCL and gloo
    {{- end }}
  {{- include "shoehorn.scheduling" .root | nindent 2 }}
  containers:
    - name: shoehorn
      image: "{{ $values.image.repository }}:{{ $values.image.tag }}"
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext: {{- include "shoehorn.containerSecurity" .root | nindent 8 }}
      env:
        {{- include "shoehorn.environment" .root | nindent 8 }}
        {{- include "shoehorn.hubEnvironment" .root | nindent 8 }}
        {{- if $isPublic }}
        {{- include "shoehorn.publicEnvironment" .root | nindent 8 }}
        {{- end }}
        {{- if $usesSecret }}
        {{- include "shoehorn.clusterSecret" .root | nindent 8 }}
        {{- end }}
        {{- if and $hasFront (ne .role "worker") }}
        - {name: REPLICA_PORT, value: "6335"}
        {{- end }}
        {{- if $isGroup }}
        - {name: ROLE, value: {{ .role }}}
        - {name: CLUSTER_NODES, value: {{ $values.nodes | quote }}}
        - {name: CLUSTER_NETWORK, value: trusted} # pods share one network; the NetworkPolicy closes it
        - {name: NODE_ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- if eq .role "worker" }}
        - {name: HEAD_ADDRESS, value: $(LWS_LEADER_ADDRESS)}
        {{- end }}
        {{- end }}
      ports:
        - {name: http, containerPort: 6333}
        - {name: metrics, containerPort: 6334}
        {{- if and $hasFront (ne .role "worker") }}
        - {name: replica, containerPort: 6335}
        {{- end }}
      {{- include "shoehorn.probes" (dict "scheme" (ternary "HTTPS" "HTTP" (and $isPublic (ne $values.secrets.tls.name "")))) | nindent 6 }}
      resources:
        {{- $resources := deepCopy $values.resources }}
        {{- if $values.gpus }}
        {{- $limits := merge (dict "nvidia.com/gpu" $values.gpus) ($resources.limits | default dict) }}
        {{- $_ := set $resources "limits" $limits }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: /models}
        - {name: cache, mountPath: /var/cache/shoehorn}
        - {name: shm, mountPath: /dev/shm}
        {{- include "shoehorn.writableMounts" .root | nindent 8 }}
        {{- if $usesSecret }}
        - {name: cluster, mountPath: /run/secrets/cluster, readOnly: true}
        {{- end }}
        {{- if $values.secrets.hfToken.name }}
        - {name: hf, mountPath: /run/secrets/hf, readOnly: true}
        {{- end }}
        {{- if $values.secrets.modelscopeToken.name }}
        - {name: modelscope, mountPath: /run/secrets/modelscope, readOnly: true}
        {{- end }}
        {{- if $isPublic }}
        {{- include "shoehorn.publicMounts" .root | nindent 8 }}
        {{- end }}
  volumes:
    - {name: cache, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $values.sharedMemory }}}}
    {{- include "shoehorn.writableVolumes" .root | nindent 4 }}
    {{- if $usesSecret }}
    {{- include "shoehorn.secretVolume" (dict "volume" "cluster" "secret" $values.secrets.cluster "file" "secret") | nindent 4 }}
    {{- end }}
    {{- if $values.secrets.hfToken.name }}
    {{- include "shoehorn.secretVolume" (dict "volume" "hf" "secret" $values.secrets.hfToken "file" "token") | nindent 4 }}
    {{- end }}
    {{- if $values.secrets.modelscopeToken.name }}
    {{- include "shoehorn.secretVolume" (dict "volume" "modelscope" "secret" $values.secrets.modelscopeToken "file" "token") | nindent 4 }}
    {{- end }}
    {{- if $isPublic }}
    {{- include "shoehorn.publicVolumes" .root | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "shoehorn.publicMounts" -}}
{{- if .Values.secrets.apiKeys.name }}
- {name: api-keys, mountPath: /run/secrets/api-keys, readOnly: true}
{{- end }}
{{- if .Values.secrets.tls.name }}
- {name: tls, mountPath: /run/secrets/tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "shoehorn.publicVolumes" -}}
{{- if .Values.secrets.apiKeys.name }}
{{ include "shoehorn.secretVolume" (dict "volume" "api-keys" "secret" .Values.secrets.apiKeys "file" "keys") }}
{{- end }}
{{- if .Values.secrets.tls.name }}
- {name: tls, secret: {secretName: {{ .Values.secrets.tls.name | quote }}, defaultMode: 0440}}
{{- end }}
{{- end }}
