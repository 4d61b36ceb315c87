// Command webhook is a mutating admission webhook: it labels each object that it is asked about with the value of
// -label and the node that it runs on, so that the rig sees on which node the request arrived.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

// The parts of admission.k8s.io/v1 that are used here.
type review struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Request    *request  `json:"request,omitempty"`
	Response   *response `json:"response,omitempty"`
}

type request struct {
	UID string `json:"uid"`
}

type response struct {
	UID       string `json:"uid"`
	Allowed   bool   `json:"allowed"`
	PatchType string `json:"patchType"`
	Patch     []byte `json:"patch"`
}

func main() {
	listen := flag.String("listen", ":8443", "address to listen on")
	cert := flag.String("cert", "/etc/webhook/tls.crt", "certificate")
	key := flag.String("key", "/etc/webhook/tls.key", "the certificate's private key")
	annotation := flag.String("annotation", "edge-tunnel.test/admitted-on", "annotation to set to the node's name")
	flag.Parse()
	patch, err := json.Marshal([]map[string]any{
		{"op": "add", "path": "/metadata/annotations", "value": map[string]string{*annotation: os.Getenv("NODE_NAME")}},
	})
	if err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("/admit", func(writer http.ResponseWriter, asked *http.Request) {
		var seen review
		if err := json.NewDecoder(http.MaxBytesReader(writer, asked.Body, 1<<20)).Decode(&seen); err != nil || seen.Request == nil {
			http.Error(writer, fmt.Sprintf("not an AdmissionReview: %v", err), http.StatusBadRequest)
			return
		}
		answer := review{APIVersion: seen.APIVersion, Kind: seen.Kind, Response: &response{
			UID: seen.Request.UID, Allowed: true, PatchType: "JSONPatch", Patch: patch,
		}}
		writer.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(writer).Encode(answer); err != nil {
			log.Print(err)
		}
	})
	http.HandleFunc("/node", func(writer http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(writer, os.Getenv("NODE_NAME"))
	})
	server := &http.Server{Addr: *listen, ReadHeaderTimeout: 5 * time.Second}
	log.Fatal(server.ListenAndServeTLS(*cert, *key))
}
